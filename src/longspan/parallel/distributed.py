"""Collectives between processes through torch.distributed (gloo on CPUs).

It owns the process group and point-to-point transfers; it must not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import WorkerDied
from longspan.parallel.collectives import Collectives, Traffic

_TIMEOUT = timedelta(minutes=30)


def join_world(rank: int, world_size: int, store_path: str) -> None:
    """Join the default process group, meeting the other ranks at a file all of them can open."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store_path}", rank=rank, world_size=world_size, timeout=_TIMEOUT
    )


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
            raise WorkerDied(f"rank {self._me} lost a peer: {error}") from error
        return received
