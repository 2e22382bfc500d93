"""Run a function on N ranks, threads or processes, for benchmarks of parts that need no engine.

It owns starting the ranks and collecting what they return; it must not know what they measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from longspan.engine.cores import share_of_cores
from longspan.engine.transport.connection import use_interface
from longspan.errors import EngineError
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric
from longspan.parallel.world import join_world, leave_world, open_group
from longspan.private_folder import PrivateFolder

MakeGroup = Callable[[Sequence[int]], Collectives]


class RankFunction(Protocol):
    """The function that every rank runs. Ranks that are processes need one that can be pickled."""

    def __call__(self, rank: int, make_group: MakeGroup, traffic: Traffic) -> Any: ...


def run_on_ranks(executor: str, world_size: int, function: RankFunction, device_type: str = "cpu") -> list[Any]:
    """Run `function` on `world_size` ranks; returns their results in rank order.

    `executor` is `threads`; any other value means processes, on GPUs if `device_type` is `cuda`.
    """
    if executor == "threads":
        return _as_threads(world_size, function)
    return _as_processes(world_size, function, device_type)


def _as_threads(world_size: int, function: RankFunction) -> list[Any]:
    fabric = ThreadFabric(world_size)

    def serve(rank: int) -> Any:
        torch.set_num_threads(share_of_cores(world_size))
        traffic = Traffic()
        try:
            with torch.inference_mode():
                return function(rank, lambda group: ThreadedCollectives(fabric, group, rank, traffic), traffic)
        except BaseException:
            fabric.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(serve, range(world_size)))


def _as_processes(world_size: int, function: RankFunction, device_type: str) -> list[Any]:
    context = get_context("spawn")
    with PrivateFolder() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, folder, theirs, function, device_type), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [_receive(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise EngineError("a rank of the benchmark ended unexpectedly; its message is above") from None


def _serve(rank: int, world_size: int, folder: str, pipe: Connection, function: RankFunction, device_type: str) -> None:
    torch.set_num_threads(share_of_cores(world_size))
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    use_interface("")
    join_world(rank, world_size, f"{folder}/store", device)
    traffic = Traffic()
    with torch.inference_mode():
        pipe.send(function(rank, lambda group: open_group(group, rank, traffic, device), traffic))
    leave_world()
