"""The work of a launch in device memory: made for one step, or with room to be refilled for a CUDA graph.

It owns the buffers and the copies to them. `work.py` computes their content, and the kernels read it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import ge
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.backends.triton.columns import ColumnTable, DecodeColumns, Integers
from longspan.attention.backends.triton.decode import DecodeWork, plan_decode
from longspan.attention.backends.triton.work import (
    SHORT_SPAN,
    Item,
    Slots,
    Split,
    Tiling,
    Work,
    most_blocks,
    most_items,
    plan_work,
    visible_in_runs,
    visible_on_diagonal,
)
from longspan.attention.host_copy import copy_to
from longspan.attention.step_buffer import StepBuffer
from longspan.plan.decode import DecodeRuns
from longspan.plan.reach import QueryRun

ITEM_FIELDS = len(Item._fields)
_ROW, _START, _FULL_STOP, _STOP = map(Item._fields.index, ("row", "start", "full_stop", "stop"))
SPLIT_FIELDS = len(Split._fields)
_ALIGNED = 4  # int32 in 16 bytes: Triton compiles a kernel again for pointers that are not aligned to 16 bytes


class Capacity(NamedTuple):
    """The size of the buffers of one launch."""

    # items over adjacent slots
    adjacent: int
    # items over gathered slots
    gathered: int
    # rows that several items share, by block
    splits: int
    # blocks of partial results
    partials: int
    # query rows (tokens)
    rows: int
    # slots in the index
    index: int  # type: ignore[assignment]

    @staticmethod
    def of(work: Work) -> Capacity:
        """The size that `work` needs."""
        counts = len(work.adjacent), len(work.gathered), len(work.splits)
        return Capacity(*counts, work.partials, len(work.bounds), work.index.length)

    def holds(self, other: Capacity) -> bool:
        """Whether work that needs `other` fits."""
        return all(map(ge, self, other))


class WorkPlan:
    """The work of one launch as int32 on the device: adjacent and gathered items, splits, bounds, index.

    `counts` are the numbers of adjacent and of gathered items. `arrived` counts, for each first partial result of some
    rows and each of `heads` KV heads, the programs that have stored such a result. The last one sets it to 0 again.

    Raises ValueError if the work does not fit into `capacity`. An `index` and a `buffer` that are passed belong to the
    caller, who sends the buffer.
    """

    def __init__(
        self,
        work: Work,
        device: torch.device,
        heads: int,
        capacity: Capacity | None = None,
        index: Tensor | None = None,
        buffer: StepBuffer | None = None,
    ) -> None:
        self.capacity = room = capacity or Capacity.of(work)
        counts = room.adjacent * ITEM_FIELDS, room.gathered * ITEM_FIELDS, room.splits * SPLIT_FIELDS, room.rows * 2, 2
        self._sizes = [-(-count // _ALIGNED) * _ALIGNED for count in counts]
        self._table = (buffer or StepBuffer(device)).reserve(sum(self._sizes))
        parts = torch.split(self._table.device, self._sizes)
        self.adjacent, self.gathered, self.splits, self.bounds, self.counts = parts
        waiting, made = room.partials * heads, torch.zeros if room.partials else torch.empty
        self.arrived = made(max(waiting, 1), dtype=torch.int32, device=device)
        self.index = torch.empty(max(room.index, 1), dtype=torch.int32, device=device) if index is None else index
        self._decode: _GrowingWork | None = None  # what `fill_decode` was given last, unless `fill` came after it
        if not self.fill(work):
            raise ValueError(f"work of size {Capacity.of(work)} in a plan of {room}")

    def fill(self, work: Work) -> bool:
        """Replace the work, in the order of the current stream. False, and nothing is changed, if it does not fit."""
        if not self.capacity.holds(Capacity.of(work)):
            return False
        self._decode = None
        table = array("i")
        counts = len(work.adjacent), len(work.gathered)
        records: list[Sequence[tuple[int, ...]]] = [work.adjacent, work.gathered, work.splits, work.bounds, [counts]]
        for size, some in zip(self._sizes, records, strict=True):
            part = array("i", chain.from_iterable(some))
            table.extend(part)
            table.extend(array("i", bytes(4 * (size - len(part)))))  # an item of size 0 is no work
        self._table.host[:] = table
        self._table.send()
        if (slots := _expanded(work.index)) is not None:
            copy_to(self.index[: len(slots)], slots)
        return True

    def fill_decode(self, work: DecodeWork, columns: DecodeColumns, tile: int) -> None:
        """Replace the work, which must fit, once the buffer is sent. The index is not touched.

        The work is that of `columns`, in tiles of `tile` columns.
        """
        self._decode = _GrowingWork(columns, tile, self._table.host, self._sizes, work)
        at, counts = 0, np.array([len(work.adjacent), len(work.gathered)])
        fields = work.adjacent, work.gathered, work.splits, work.bounds, counts
        for size, records in zip(self._sizes, fields, strict=True):
            self._table.host[at : at + records.size] = records.reshape(-1)
            self._table.host[at + records.size : at + size] = 0  # an item of size 0 is no work
            at += size

    def grow(self, columns: DecodeColumns) -> bool:
        """Let the last items of rows end with the last of `columns`, once the buffer is sent.

        False, and nothing is changed, if the work is not that of `columns` with a few columns less.
        """
        return self._decode is not None and self._decode.grow(columns)


class _GrowingWork:
    """The work of decode rows in a table on the host, whose contexts get a column in every step.

    To plan them anew takes many times as long. It is done after a tile of columns, so that pieces stay about as long as
    planned.
    """

    def __init__(
        self, columns: DecodeColumns, tile: int, table: Integers, sizes: Sequence[int], work: DecodeWork
    ) -> None:
        self._columns = columns  # when it was planned
        self._tile = tile
        self._table = table
        self._sizes = sizes
        self._counts = len(work.adjacent), len(work.gathered)
        self._ends: list[tuple[Integers, Integers]] | None = None  # see `_found_ends`

    def grow(self, columns: DecodeColumns) -> bool:
        """See `WorkPlan.grow`."""
        before = self._columns
        same = columns.starts is before.starts and np.array_equal(columns.lows, before.lows)
        more = columns.highs - before.highs if same else np.array([-1])
        if not ((more >= 0) & (more < self._tile)).all():
            return False
        bounds = self._bounds
        if self._ends is None:
            self._ends = self._found_ends(bounds)
        bounds[columns.rows, 1] = columns.highs
        for items, last in self._ends:
            starts, stops = items[last, _START], bounds[items[last, _ROW], 1]
            items[last, _FULL_STOP] = starts + (stops - starts) // self._tile * self._tile
            items[last, _STOP] = stops
        return True

    @property
    def _bounds(self) -> Integers:
        at = sum(self._sizes[:3])
        return self._table[at : at + self._sizes[3] // 2 * 2].reshape(-1, 2)

    def _found_ends(self, bounds: Integers) -> list[tuple[Integers, Integers]]:
        """(items, which of them end with the last column of their row), of adjacent and of gathered slots."""
        found, at = [], 0
        for size, count in zip(self._sizes, self._counts, strict=False):
            items = self._table[at : at + count * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
            last = (items[:, _STOP] == bounds[items[:, _ROW], 1]) & (items[:, _STOP] > items[:, _START])
            found.append((items, np.flatnonzero(last)))
            at += size
        return found


class Plans:
    """A `WorkPlan` for each tiling of the same rows, made when a layer first needs it."""

    def __init__(self, rows: int, longest: int, device: torch.device, work: Callable[[Tiling], Work]) -> None:
        self.rows = rows  # query rows (tokens)
        self.longest = longest  # rows of the longest run
        self._device = device
        self._work = work
        self._plans: dict[Tiling, WorkPlan] = {}

    @staticmethod
    def of_runs(runs: Sequence[QueryRun], rows: int, device: torch.device) -> Plans:
        """Plans for runs against cached rows."""
        longest = max((run.length for run in runs), default=1)
        return Plans(rows, longest, device, _work_of_runs(runs, rows))

    @staticmethod
    def of_diagonal(segments: Sequence[tuple[int, int]], rows: int, window: int | None, device: torch.device) -> Plans:
        """Plans for the diagonals of segments (first row, length)."""
        visible = visible_on_diagonal(segments, window)
        longest = max((length for _, length in segments), default=1)
        return Plans(rows, longest, device, lambda tiling: plan_work(visible, Slots(), rows, tiling))

    def plan(self, tiling: Tiling) -> WorkPlan:
        """The plan for one tiling."""
        if tiling not in self._plans:
            self._plans[tiling] = self._make(tiling)
        return self._plans[tiling]

    def _make(self, tiling: Tiling) -> WorkPlan:
        return WorkPlan(self._work(tiling), self._device, tiling.kv_heads)


class RefillablePlans(Plans):
    """Plans in buffers at fixed addresses, which are refilled before each replay of a CUDA graph.

    The buffers must be made by a first call outside the capture. `index` is the number of slots of short spans for
    which there is room. With a `table` the plans are for `DecodeRuns` and read its index instead. Runs of more than
    `longest` rows are computed correctly, but with tiles for shorter runs.
    """

    def __init__(
        self,
        rows: int,
        longest: int,
        index: int,
        device: torch.device,
        table: ColumnTable | None = None,
        buffer: StepBuffer | None = None,
    ) -> None:
        super().__init__(rows, longest, device, _work_of_runs((), rows))
        self._index = index
        self._table = table
        self._buffer = buffer
        self._columns: DecodeColumns | None = None  # of the last step

    @property
    def plans(self) -> tuple[WorkPlan, ...]:
        """The plans made so far."""
        return tuple(self._plans.values())

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """Replace the runs in all plans. Returns False, and changes nothing, if they do not fit into some plan."""
        if self._table is not None and isinstance(runs, DecodeRuns):
            return self._fill_decode(runs, self._table)
        # the index of a table is only for `DecodeRuns`: others, over the pages of several ranks, are read in place
        work_of = _work_of_runs(runs, self.rows, 0 if self._table else SHORT_SPAN)
        works = {tiling: work_of(tiling) for tiling in self._plans}
        if not all(self._plans[tiling].capacity.holds(Capacity.of(work)) for tiling, work in works.items()):
            return False
        self._work = work_of
        for tiling, work in works.items():
            self._plans[tiling].fill(work)
        return True

    def _fill_decode(self, runs: DecodeRuns, table: ColumnTable) -> bool:
        """`fill` with arrays, through the index of `table`."""
        self._columns = columns = table.of(runs, self._columns)
        if columns is None:
            return False
        plans = [(tiling, plan) for tiling, plan in self._plans.items() if not plan.grow(columns)]
        works = [(tiling.block_n, plan, plan_decode(columns, self.rows, tiling)) for tiling, plan in plans]
        if not all(plan.capacity.holds(_capacity_of(work)) for _, plan, work in works):
            return False
        for tile, plan, work in works:
            plan.fill_decode(work, columns, tile)
        return True

    def _make(self, tiling: Tiling) -> WorkPlan:
        """See `Plans._make`. Raises RuntimeError during a capture: the buffers must be allocated before."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attend once with these runs before the capture: its buffers must outlive the graph")
        index = self._table.index if self._table else None
        room = self._capacity(tiling)
        return WorkPlan(self._work(tiling), self._device, tiling.kv_heads, room, index, self._buffer)

    def _capacity(self, tiling: Tiling) -> Capacity:
        """The size of the buffers for decode rows with one range of slots each."""
        items = most_items(self.rows, tiling)
        gathered = items if self._index or self._table else 0
        return Capacity(items, gathered, most_blocks(self.rows, tiling), items + gathered, self.rows, self._index)


def _capacity_of(work: DecodeWork) -> Capacity:
    counts = len(work.adjacent), len(work.gathered), len(work.splits)
    return Capacity(*counts, work.partials, len(work.bounds), 0)


def _work_of_runs(runs: Sequence[QueryRun], rows: int, short: int = SHORT_SPAN) -> Callable[[Tiling], Work]:
    """A function that plans the work of these runs for a tiling, with an index of their spans of less than `short`."""
    visible, index = visible_in_runs(runs, short)
    return lambda tiling: plan_work(visible, index, rows, tiling)


def _expanded(slots: Slots) -> Tensor | None:
    """The slots one by one, int32 [R] on the host; None if there are none.

    Computed with tensor operations, as there can be as many slots as tokens in all contexts.
    """
    if not slots.length:
        return None
    numbers = torch.frombuffer(array("i", chain.from_iterable(slots.spans)), dtype=torch.int32)
    starts, lengths = numbers.view(-1, 2).unbind(1)
    ends = lengths.cumsum(0, dtype=torch.int32)
    offsets = torch.repeat_interleave(starts - ends + lengths, lengths, output_size=slots.length)
    return torch.arange(slots.length, dtype=torch.int32) + offsets
