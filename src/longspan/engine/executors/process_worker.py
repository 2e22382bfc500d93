"""The main program of a worker process: `python -m longspan.engine.executors.process_worker FOLDER RANK PARENT`.

It owns the process's life: it starts from the configuration in FOLDER, answers the driver, and ends when
told to or when the driver is gone.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
import zmq

from longspan.config import EngineConfig
from longspan.engine.executors.lifetime import end_with_parent
from longspan.engine.executors.messages import FromWorker, Ready, Stepped, TraceReport, TrafficReport, failure
from longspan.engine.executors.steps import StepLoop
from longspan.engine.loading import TensorStore
from longspan.engine.setup import resolve
from longspan.engine.worker import build_runner, threads_per_rank
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.distributed import join_world, leave_world, open_group
from longspan.parallel.trace import Trace
from longspan.plan import StepPlan


def main(folder: Path, rank: int, parent: int) -> None:
    """Serve the driver until it says stop or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group: the driver decides what they mean
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.connect(f"ipc://{folder}/rank-{rank}")
    results = context.socket(zmq.PUSH)
    results.connect(f"ipc://{folder}/results")

    def answer(message: FromWorker) -> None:
        results.send(msgspec.msgpack.encode(message))

    try:
        _serve(folder, rank, inbox, answer)
    except BaseException as error:
        answer(failure(rank, error))
    finally:
        context.destroy(linger=1000)
        leave_world()


def _serve(folder: Path, rank: int, inbox: zmq.Socket[bytes], answer: Callable[[FromWorker], None]) -> None:
    setup = resolve(msgspec.json.decode((folder / "config").read_bytes(), type=EngineConfig))
    torch.set_num_threads(threads_per_rank(setup))
    device = setup.device(rank)
    join_world(rank, setup.grid.world_size, str(folder / "store"), device)
    traffic = Traffic(trace=Trace(setup.config.trace))

    def make_group(group: Sequence[int]) -> Collectives:
        return open_group(group, rank, traffic, device)

    runner, constants = build_runner(setup, rank, TensorStore(setup.source.checkpoint, setup.dtype, device), make_group)
    traffic.reset()  # what was measured with is not the engine's
    answer(Ready(rank, constants))
    loop = StepLoop(runner, lambda tokens: answer(Stepped(rank, tokens)), lambda: bool(inbox.poll(0)))
    while True:
        message = inbox.recv()
        if message == b"stop":
            return
        if message in (b"traffic", b"trace"):
            loop.flush()
        if message == b"traffic":
            answer(TrafficReport(rank, traffic.bytes_by_label, traffic.calls_by_label))
        elif message == b"trace":
            answer(TraceReport(rank, traffic.trace.spans))
        else:
            loop.take(StepPlan.decode(message))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
