"""Collectives between processes through torch.distributed's default group, on CPUs gloo.

It owns transfers between pairs and their failures; it must not know what the tensors mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import WorkerDied
from longspan.parallel.collectives import Arrival, Collectives, Traffic

_MAX_LEAVING = 8  # sends to one group that may be in flight
Transfer = tuple[Callable[..., dist.Work | None], Tensor, int]
"""`dist.isend` or `dist.irecv`, what it reads or writes, and the member on the other side."""


class DistributedCollectives(Collectives):
    """A group of processes. Uneven shapes need no padding: pairs send what they have, empty tensors nothing."""

    def __init__(self, group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(group.index(rank), len(group), traffic)
        self._group = tuple(group)
        self._me = rank
        self._device = device
        self._leaving: deque[tuple[list[dist.Work], Tensor]] = deque()  # a tensor must live until it has arrived

    def _send(self, x: Tensor, member: int) -> None:
        whole = x.contiguous()
        self._leaving.append((self._start([(dist.isend, whole, member)]), whole))
        while len(self._leaving) > _MAX_LEAVING:
            self._wait(self._leaving.popleft()[0])

    def _start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        x = torch.empty(shape, dtype=dtype, device=self._device)
        work = self._start([(dist.irecv, x, member)])

        def arrived() -> Tensor:
            self._wait(work)
            return x

        return arrived

    def _exchange(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        received = [
            sends[member] if member == self.rank else torch.empty(shape, dtype=sends[member].dtype, device=self._device)
            for member, shape in enumerate(shapes)
        ]
        peers = [member for member in range(self.size) if member != self.rank]
        whole = {id(sends[member]): sends[member].contiguous() for member in peers}  # one where all get the same
        arriving: list[Transfer] = [(dist.irecv, received[member], member) for member in peers]
        leaving: list[Transfer] = [(dist.isend, whole[id(sends[member])], member) for member in peers]
        self._wait(self._start(arriving + leaving))
        return received

    def _start(self, transfers: Sequence[Transfer]) -> list[dist.Work]:
        """Those that carry something, all at once."""
        with self._lost_peers():
            started = [direction(x, self._group[member]) for direction, x, member in transfers if x.numel()]
        return [work for work in started if work is not None]

    def _wait(self, work: Sequence[dist.Work]) -> None:
        """On a GPU the current stream waits, not the caller."""
        with self._lost_peers():
            for one in work:
                one.wait()

    @contextmanager
    def _lost_peers(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own trouble
            raise
        except RuntimeError as error:
            raise WorkerDied(f"rank {self._me} lost a peer: {error}") from error
