"""Collectives between processes, by point-to-point transfers of torch.distributed's default group (gloo on CPUs).

It owns the transfers between pairs of ranks and the handling of their failures; it must not know what the tensors mean.
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

_MAX_LEAVING = 8  # sends of one group that may be in flight; the next one waits for the oldest
Transfer = tuple[Callable[..., dist.Work | None], Tensor, int]
"""`dist.isend` or `dist.irecv`, the tensor that it reads or writes, and the member on the other side."""


class DistributedCollectives(Collectives):
    """A group of processes. Tensors of different shapes are sent without padding, and empty ones are not sent."""

    def __init__(self, group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(group.index(rank), len(group), traffic)
        self._group = tuple(group)
        self._me = rank
        self._device = device
        self._leaving: deque[tuple[list[dist.Work], Tensor]] = deque()  # keeps tensors alive until they are sent

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
        whole = {id(sends[member]): sends[member].contiguous() for member in peers}  # one copy if all get the same
        arriving: list[Transfer] = [(dist.irecv, received[member], member) for member in peers]
        leaving: list[Transfer] = [(dist.isend, whole[id(sends[member])], member) for member in peers]
        self._wait(self._start(arriving + leaving))  # receives first, so that no send waits for a peer's receive
        return received

    def _start(self, transfers: Sequence[Transfer]) -> list[dist.Work]:
        """Start all transfers of tensors that are not empty."""
        with self._lost_peers():
            started = [direction(x, self._group[member]) for direction, x, member in transfers if x.numel()]
        return [work for work in started if work is not None]

    def _wait(self, work: Sequence[dist.Work]) -> None:
        """Wait for transfers. With NCCL the current stream waits, not the calling thread."""
        with self._lost_peers():
            for one in work:
                one.wait()

    @contextmanager
    def _lost_peers(self) -> Iterator[None]:
        """Raise `WorkerDied` in place of a transfer's `RuntimeError`."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # subclasses of RuntimeError, but no peer is lost
            raise
        except RuntimeError as error:
            raise WorkerDied(f"rank {self._me} lost a peer: {error}") from error
