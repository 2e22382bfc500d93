"""Collectives between processes that have one GPU each, through torch.distributed's NCCL backend.

It owns the communicator of a group and what differs with NCCL: the transfers of one exchange are started together, run
on the communicator's own stream, and are waited for with CUDA events, not by the CPU. Tests run it over gloo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.parallel.collectives import Arrival, Traffic
from longspan.parallel.distributed import DistributedCollectives, Transfer
from longspan.parallel.symmetric import FastSums, open_symmetric_sums

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.12

_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class NcclCollectives(DistributedCollectives):
    """A group of processes. All members must create their groups in the same order."""

    def __init__(self, group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> None:
        super().__init__(group, rank, traffic, device)
        self._members = dist.new_group(list(group), use_local_synchronization=True) if len(group) > 1 else None
        if self._members is not None:  # point-to-point transfers need a communicator, which all members must create
            dist.all_reduce(torch.zeros(1, device=device), group=self._members)
        self._sums: FastSums | None = None

    def open_fast_sums(self) -> tuple[bool, str] | None:
        """See `Collectives.open_fast_sums`."""
        if self._members is None:
            return None
        self._sums, how = open_symmetric_sums(self._members, self._device)
        return self._sums is not None, how

    def start_shift(self, x: Tensor, to: int, shape: tuple[int, ...], source: int, label: str) -> Arrival:
        """See `Collectives.start_shift`. Both directions start in one NCCL group; two sends first would deadlock."""
        self.traffic.count(label, x.numel() * x.element_size())
        whole, arriving = x.contiguous(), torch.empty(shape, dtype=x.dtype, device=self._device)
        work = self._start([(dist.isend, whole, to), (dist.irecv, arriving, source)])

        def arrived() -> Tensor:
            self._wait(work)
            del whole_until_sent[:]
            return arriving

        whole_until_sent = [whole]
        return self.traffic.trace.until_arrival("receive", arrived)

    def all_gather(self, x: Tensor, rows: Sequence[int], label: str, dim: int = 0) -> list[Tensor]:
        """See `Collectives.all_gather`. One NCCL operation if all members' tensors have the same shape."""
        if self._members is None or len(set(rows)) > 1 or not x.numel():
            return super().all_gather(x, rows, label, dim)
        self.traffic.count(label, (self.size - 1) * x.numel() * x.element_size())
        gathered = torch.empty((self.size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=self._device)
        with self._lost_peers():
            _ALL_GATHER(gathered, x.contiguous(), group=self._members)
        return list(gathered.view(self.size, *x.shape))

    def all_reduce(self, x: Tensor, label: str) -> Tensor:
        """See `Collectives.all_reduce`. By NCCL in place, and in its order; all members get the same bits."""
        if self._members is None or not x.numel():
            return x
        self.traffic.count(label, (self.size - 1) * x.numel() * x.element_size())
        if self._sums is not None and self._sums.plain.takes(x):
            return self._sums.plain(x)
        with self._lost_peers():
            dist.all_reduce(x, group=self._members)
        return x

    def sum_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, label: str
    ) -> tuple[Tensor, Tensor] | None:
        """See `Collectives.sum_add_norm`."""
        summing = None if self._sums is None else self._sums.with_norm
        if summing is None or not summing.takes(x, residual, weight):
            return None
        self.traffic.count(label, (self.size - 1) * x.numel() * x.element_size())
        return summing(x, residual, weight, eps)

    def reduce_scatter(self, x: Tensor, rows: Sequence[int], label: str) -> Tensor:
        """See `Collectives.reduce_scatter`. One NCCL operation if all parts have the same shape."""
        if self._members is None or len(set(rows)) > 1 or not x.numel():
            return super().reduce_scatter(x, rows, label)
        part = x.new_empty((rows[self.rank], *x.shape[1:]))
        self.traffic.count(label, (self.size - 1) * part.numel() * part.element_size())
        with self._lost_peers():
            _REDUCE_SCATTER(part, x.contiguous(), group=self._members)
        return part

    def _start(self, transfers: Sequence[Transfer]) -> list[dist.Work]:
        operations = [
            dist.P2POp(direction, tensor, self._group[member], self._members)
            for direction, tensor, member in transfers
            if tensor.numel()
        ]
        if not operations:
            return []
        with self._lost_peers():
            return list(dist.batch_isend_irecv(operations))
