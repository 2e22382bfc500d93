"""The KV pool of one rank: the tensors in which pages are stored.

It owns these tensors, and writing to slots with plain tensor operations; it must not know which request a slot belongs
to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longspan.attention.rows import CacheRows, quantise
from longspan.cache.layout import KVLayout
from longspan.parallel.collectives import Collectives
from longspan.plan.reach import first_slots
from longspan.plan.view import WriteRun

_FEW_RUNS = 4  # up to this many runs are written as slices, more with an index tensor


class _PlainWriter(ABC):
    """A `Writer` that uses plain tensor operations."""

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """See `Writer.write`."""
        for plane, rows in enumerate((k, v)[: len(cache.values)]):
            by_head = rows.transpose(0, 1)
            if cache.scales is None:
                self._store(cache.values[plane], by_head)
                continue
            values, scales = quantise(by_head, cache.values.dtype, cache.groups)
            self._store(cache.values[plane].view(torch.uint8), values.view(torch.uint8))
            self._store(cache.scales[plane], scales)

    @abstractmethod
    def _store(self, part: Tensor, by_head: Tensor) -> None:
        """Write rows `by_head` [Hkv, T, D] to their slots of `part` [Hkv, S, D]."""


class SlotWriter(_PlainWriter):
    """Writes to slots that are known on the host."""

    def __init__(self, writes: Sequence[WriteRun], rows: int, device: torch.device) -> None:
        self._runs = writes if len(writes) <= _FEW_RUNS else ()
        self._slots: Tensor | None = None  # [R] int64: the slots that are written, if there are more runs
        self._rows: Tensor | None = None  # [R] int64: the rows that go there; None for all rows in order
        if not self._runs and writes:
            index = [row for run in writes for row in range(run.row, run.row + run.length)]
            self._rows = torch.tensor(index, device=device) if len(index) < rows else None
            slots = [slot for run in writes for slot in range(run.slot, run.slot + run.length)]
            self._slots = torch.tensor(slots, device=device)

    def _store(self, part: Tensor, by_head: Tensor) -> None:
        for run in self._runs:
            part[:, run.slot : run.slot + run.length] = by_head[:, run.row : run.row + run.length]
        if self._slots is not None:
            chosen = by_head if self._rows is None else by_head[:, self._rows]
            part.index_copy_(1, self._slots, chosen)


class DeviceSlotWriter(_PlainWriter):
    """Writes to `slots` int32 [T] on the device, without reading them; rows with -1 are not written."""

    def __init__(self, slots: Tensor) -> None:
        written = slots >= 0
        # a row that is not written repeats the first one that is. If none is, all write what slot 0 has already
        self._rows = torch.where(written, torch.arange(len(slots), device=slots.device), written.int().argmax())
        self._slots = slots[self._rows].long().clamp_min(0)
        self._any = written.any()

    def _store(self, part: Tensor, by_head: Tensor) -> None:
        part.index_copy_(1, self._slots, torch.where(self._any, by_head[:, self._rows], part[:, self._slots]))


class KVPool:
    """The cached rows of each layer on this rank. They are not initialised, so a CPU commits memory page by page."""

    def __init__(
        self,
        layout: KVLayout,
        layers: Iterable[int],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        shape = layout.pool_shape(num_pages, page_size)
        groups = layout.scale_groups

        def rows() -> CacheRows:
            scales = torch.empty(*shape[:3], len(groups), device=device) if groups else None
            return CacheRows(torch.empty(shape, dtype=dtype, device=device), scales, groups)

        self.device = device
        self.slots = num_pages * page_size
        self.layers = {layer: rows() for layer in layers}
        # the same layers with the rows of other ranks as peers; empty if this rank cannot read these in place
        self.mapped: dict[int, CacheRows] = {}
        self.first_slots: tuple[int, ...] = ()  # see `Place.first_slots`

    def map_peers(self, group: Collectives) -> None:
        """Make the rows of the other members readable in place. All members must call this at the same time.

        Needs a group whose members share memory.
        """
        slots: list[int] = []
        for layer, rows in self.layers.items():
            values = group.in_place(rows.values)
            scales = [None] * group.size if rows.scales is None else group.in_place(rows.scales)
            pools = [CacheRows(one, its, rows.groups) for one, its in zip(values, scales, strict=True)]
            slots = [pool.tokens for pool in pools]
            del pools[group.rank]
            self.mapped[layer] = replace(rows, peers=tuple(pools))
        self.first_slots = first_slots(slots, group.rank) if slots else ()
