"""The work of a launch over decode rows, computed with arrays: what `plan_work` gives, in less time.

It owns this shortcut for rows that are runs of their own; `work.py` is the reference, and says what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longspan.attention.backends.triton.columns import DecodeColumns, Integers
from longspan.attention.backends.triton.work import (
    Item,
    Slots,
    Split,
    Stretch,
    Tiling,
    VisibleColumns,
    piece_lengths,
    plan_work,
    time_of,
)

_NO_PARTIAL = -1
_FEW_RUNS = 4  # for so few, numbers one by one take less time than arrays


@dataclass(frozen=True)
class DecodeWork:
    """See `Work`; records are rows of int64 arrays, with fields in the same order."""

    # [items, fields of `Item`]
    adjacent: Integers
    # [items, fields of `Item`]
    gathered: Integers
    # [splits, fields of `Split`]
    splits: Integers
    # [rows, 2]
    bounds: Integers
    # number of blocks of partial results
    partials: int


def plan_decode(columns: DecodeColumns, rows: int, tiling: Tiling) -> DecodeWork:
    """The work of one launch over `rows` rows (tokens)."""
    if len(columns.rows) <= _FEW_RUNS:
        return _one_by_one(columns, rows, tiling)
    bounds = np.zeros((rows, 2), dtype=np.int64)
    bounds[columns.rows, 0], bounds[columns.rows, 1] = columns.lows, columns.highs
    tile, runs, blocks = tiling.block_n, len(columns.rows), -(-tiling.group // tiling.block_m)
    counts, starts, stops, places, gathered = _visible(columns)

    # every block of a row meets all ranges of the row: order by row, block, range
    block, within = _ragged(np.repeat(counts, blocks))
    ranges = (np.cumsum(counts) - counts)[block // blocks] + within
    lengths = (stops - starts)[ranges]
    longest = _piece_length(lengths, tiling)
    size = _up(_per(lengths, np.maximum(_per(lengths, longest), 1)), tile)
    piece, number = _ragged(_per(lengths, size))
    of_range, of = ranges[piece], block[piece]  # the range and the block of each piece
    start = starts[of_range] + number * size[piece]
    stop = np.minimum(start + size[piece], stops[of_range])

    pieces = np.bincount(of, minlength=runs * blocks)
    shared = pieces > 1
    last = np.cumsum(pieces * shared)
    part = last - pieces  # its first partial result, where a block is shared
    ordinal = np.arange(len(of)) - (np.cumsum(pieces) - pieces)[of]
    head = np.empty((runs * blocks, 3), dtype=np.int64)  # row, first and size: see `Item`
    head[:, 0], head[:, 1] = np.repeat(columns.rows, blocks), np.tile(np.arange(blocks) * tiling.block_m, runs)
    head[:, 2] = np.minimum(tiling.block_m, tiling.group - head[:, 1])
    items = np.empty((len(of), len(Item._fields)), dtype=np.int64)
    items[:, :3], items[:, 3], items[:, 4], items[:, 5] = head[of], places[of_range], start, start
    items[:, 6], items[:, 7] = start + (stop - start) // tile * tile, stop
    items[:, 8] = np.where(shared[of], part[of] + ordinal, _NO_PARTIAL)
    items[:, 9], items[:, 10] = (np.where(shared[of], each[of], _NO_PARTIAL) for each in (part, last))
    of_split = np.flatnonzero(shared)
    splits = np.concatenate([head[of_split], part[of_split, None], last[of_split, None]], axis=1)
    through_index = gathered[of_range] != 0
    adjacent = np.concatenate([items[~through_index], _without_columns(columns.rows, rows, tiling)])
    partials = int(last[-1]) if len(last) else 0
    return DecodeWork(_ordered(adjacent), _ordered(items[through_index]), splits, bounds, partials)


def _one_by_one(columns: DecodeColumns, rows: int, tiling: Tiling) -> DecodeWork:
    """The same for few rows, whose arrays would take longer than what they hold."""
    visible: list[VisibleColumns] = []
    at = 0
    starts, places, gathered = columns.starts.tolist(), columns.places.tolist(), columns.gathered.tolist()
    of_runs = (each.tolist() for each in (columns.rows, columns.lows, columns.highs, columns.counts))
    for row, low, high, count in zip(*of_runs, strict=True):
        stops = [*starts[at + 1 : at + count], high]
        ranges = zip(starts[at : at + count], stops, places[at : at + count], gathered[at : at + count], strict=True)
        found = tuple(Stretch(first, stop, place, bool(through)) for first, stop, place, through in ranges)
        visible.append(VisibleColumns(row, found, (low,), (high,)))
        at += count
    work = plan_work(visible, Slots(), rows, tiling)
    adjacent, gathered_items, splits = (
        np.array(records, dtype=np.int64).reshape(-1, len(kind._fields))
        for records, kind in ((work.adjacent, Item), (work.gathered, Item), (work.splits, Split))
    )
    bounds = np.array(work.bounds, dtype=np.int64).reshape(-1, 2)
    return DecodeWork(adjacent, gathered_items, splits, bounds, work.partials)


def _visible(columns: DecodeColumns) -> tuple[Integers, Integers, Integers, Integers, Integers]:
    """Number of ranges that each row sees; of these (first column, column after the last, place, whether gathered)."""
    owner = np.repeat(np.arange(len(columns.rows)), columns.counts)
    stops = np.empty_like(columns.starts)
    stops[:-1] = columns.starts[1:]
    stops[np.cumsum(columns.counts) - 1] = columns.highs
    starts = np.maximum(columns.starts, columns.lows[owner])
    seen = starts < stops
    if seen.all():
        return columns.counts, starts, stops, columns.places, columns.gathered
    counts = np.bincount(owner[seen], minlength=len(columns.rows))
    return counts, starts[seen], stops[seen], columns.places[seen], columns.gathered[seen]


def _without_columns(seeing: Integers, rows: int, tiling: Tiling) -> Integers:
    """Items without columns for the other rows, int64 [items, fields of `Item`]."""
    found: list[Item] = []
    edges = [-1, *seeing.tolist(), rows] if len(seeing) < rows else ()
    for before, after in pairwise(edges):
        for first in range(0, (after - before - 1) * tiling.group, tiling.block_m):
            size = min(tiling.block_m, (after - before - 1) * tiling.group - first)
            found.append(Item(before + 1, first, size, 0, 0, 0, 0, 0, *(_NO_PARTIAL,) * 3))
    return np.array(found, dtype=np.int64).reshape(-1, len(Item._fields))


def _piece_length(lengths: Integers, tiling: Tiling) -> int:
    """See the function of the same name in `work.py`."""
    if not len(lengths):
        return tiling.block_n
    total = int(lengths.sum()) * tiling.kv_heads
    ordered = piece_lengths(total, int(lengths.max()), tiling)
    pieces = _per(lengths, np.array(ordered)[:, None]).sum(1).tolist()

    def ends(number: int) -> float:
        return time_of(ordered[number], pieces[number] * tiling.kv_heads, total, tiling)

    return ordered[min(range(len(ordered)), key=ends)]


def _ragged(counts: Integers) -> tuple[Integers, Integers]:
    """For `counts[i]` elements of each i: (i, number of the element among those of i), int64 [sum of counts]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _ordered(items: Integers) -> Integers:
    """Longest first, then by place and first column, as in `plan_work`."""
    if len(items) < 2:
        return items
    return items[np.lexsort((items[:, 4], items[:, 3], items[:, 4] - items[:, 7]))]


def _per(x: Integers, size: Integers | int) -> Integers:
    """x / size, rounded up."""
    found: Integers = -(-x // size)
    return found


def _up(x: Integers, multiple: int) -> Integers:
    """x rounded up to a multiple."""
    return _per(x, multiple) * multiple
