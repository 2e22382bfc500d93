"""Collectives between processes through torch.distributed.

It owns the way into the world of processes, and point-to-point transfers over gloo (CPUs); it must not know what the
tensors mean.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import WorkerDied
from longspan.parallel.collectives import Arrival, Collectives, Traffic
from longspan.parallel.nccl import NcclCollectives

_TIMEOUT = timedelta(minutes=30)
_MAX_LEAVING = 8  # sends to one group that may be under way


def join_world(rank: int, world_size: int, meet_at: str, device: torch.device) -> None:
    """Join the default process group; ranks meet at a path all of them can open, or at `tcp://host:port`.

    Processes on GPUs, a device each, talk over NCCL.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # a rank may replay a step that its peer runs eagerly
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meet_at if "://" in meet_at else f"file://{meet_at}",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def open_group(group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> Collectives:
    """This process's handle on a group of ranks that have joined."""
    if device.type == "cuda":
        return NcclCollectives(group, rank, traffic, device)
    return DistributedCollectives(group, rank, traffic)


def leave_world() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class DistributedCollectives(Collectives):
    """A group of processes. Uneven shapes need no padding: pairs send what they have, empty tensors nothing."""

    def __init__(self, group: Sequence[int], rank: int, traffic: Traffic) -> None:
        super().__init__(group.index(rank), len(group), traffic)
        self._group = tuple(group)
        self._me = rank
        self._leaving: deque[tuple[dist.Work | None, Tensor]] = deque()  # a tensor must live until it has arrived

    def _send(self, x: Tensor, member: int) -> None:
        if not x.numel():
            return
        try:
            whole = x.contiguous()
            self._leaving.append((dist.isend(whole, self._group[member]), whole))
            while len(self._leaving) > _MAX_LEAVING:
                work, _ = self._leaving.popleft()
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        x = torch.empty(shape, dtype=dtype)
        work = dist.irecv(x, self._group[member]) if x.numel() else None

        def arrived() -> Tensor:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(error) from error
            return x

        return arrived

    def _lost(self, error: RuntimeError) -> WorkerDied:
        return WorkerDied(f"rank {self._me} lost a peer: {error}")

    def _exchange(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        received: list[Tensor] = []
        pending: list[dist.Work | None] = []
        kept: list[Tensor] = []
        try:
            for index, peer in enumerate(self._group):
                if peer == self._me:
                    received.append(sends[index])
                    continue
                received.append(torch.empty(shapes[index], dtype=sends[index].dtype))
                if received[-1].numel():
                    pending.append(dist.irecv(received[-1], peer))
            for index, peer in enumerate(self._group):
                if peer != self._me and sends[index].numel():
                    kept.append(sends[index].contiguous())
                    pending.append(dist.isend(kept[-1], peer))
            for work in pending:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return received
