"""The work of a launch over decode rows, computed with arrays: what `plan_work` gives, in less time.

It owns this shortcut for rows that are runs of their own; `work.py` is the reference, and says what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longspan.attention.backends.triton.columns import DecodeColumns, Integers
from longspan.attention.backends.triton.work import FIXED_COST, WAVES, Item, Tiling, least_piece

_NO_PARTIAL = -1


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
    bounds = np.zeros((rows, 2), dtype=np.int64)
    bounds[columns.rows, 0], bounds[columns.rows, 1] = columns.lows, columns.highs
    tile, blocks = tiling.block_n, -(-tiling.group // tiling.block_m)
    owner, starts, stops, places, gathered = _visible(columns)
    counts = np.bincount(owner, minlength=len(columns.rows))

    # every block of a row meets all ranges of the row: order by row, block, range
    block, within = _ragged(np.repeat(counts, blocks))
    ranges = (np.cumsum(counts) - counts)[block // blocks] + within
    lengths = (stops - starts)[ranges]
    longest = _piece_length(lengths, tiling)
    size = _up(_per(lengths, np.maximum(_per(lengths, longest), 1)), tile)
    piece, number = _ragged(_per(lengths, size))
    start = starts[ranges][piece] + number * size[piece]
    stop = np.minimum(start + size[piece], stops[ranges][piece])

    of = block[piece]  # the block of each piece
    pieces = np.bincount(of, minlength=len(columns.rows) * blocks)
    shared = pieces > 1
    last = np.cumsum(np.where(shared, pieces, 0))
    ordinal = np.arange(len(of)) - (np.cumsum(pieces) - pieces)[of]
    part, after = (np.where(shared[of], at[of], _NO_PARTIAL) for at in (last - pieces, last))
    partial = np.where(shared[of], part + ordinal, _NO_PARTIAL)
    row = np.repeat(columns.rows, blocks)
    first = np.tile(np.arange(blocks) * tiling.block_m, len(columns.rows))
    packed = np.minimum(tiling.block_m, tiling.group - first)
    full_stop = start + (stop - start) // tile * tile
    place = places[ranges][piece]
    fields = row[of], first[of], packed[of], place, start, start, full_stop, stop, partial, part, after
    items = np.stack(fields, axis=1)
    through_index = gathered[ranges][piece] != 0
    splits = np.stack([row, first, packed, last - pieces, last], axis=1)[shared]
    adjacent = np.concatenate([items[~through_index], _without_columns(columns.rows, rows, tiling)])
    partials = int(last[-1]) if len(last) else 0
    return DecodeWork(_ordered(adjacent), _ordered(items[through_index]), splits, bounds, partials)


def _visible(columns: DecodeColumns) -> tuple[Integers, Integers, Integers, Integers, Integers]:
    """(run, first column, column after the last, place, whether it is gathered) of each range that its row sees."""
    owner = np.repeat(np.arange(len(columns.rows)), columns.counts)
    stops = np.empty_like(columns.starts)
    stops[:-1] = columns.starts[1:]
    ends = np.cumsum(columns.counts) - 1
    stops[ends] = columns.highs
    starts = np.maximum(columns.starts, columns.lows[owner])
    seen = starts < stops
    return owner[seen], starts[seen], stops[seen], columns.places[seen], columns.gathered[seen]


def _without_columns(seeing: Integers, rows: int, tiling: Tiling) -> Integers:
    """Items without columns for the other rows, int64 [items, fields of `Item`]."""
    found: list[Item] = []
    edges = [-1, *seeing.tolist(), rows]
    if len(edges) == rows + 2:
        return np.empty((0, len(Item._fields)), dtype=np.int64)
    for before, after in pairwise(edges):
        for first in range(0, (after - before - 1) * tiling.group, tiling.block_m):
            size = min(tiling.block_m, (after - before - 1) * tiling.group - first)
            found.append(Item(before + 1, first, size, 0, 0, 0, 0, 0, *(_NO_PARTIAL,) * 3))
    return np.array(found, dtype=np.int64).reshape(-1, len(Item._fields))


def _piece_length(lengths: Integers, tiling: Tiling) -> int:
    """See the function of the same name in `work.py`."""
    if not len(lengths):
        return tiling.block_n
    total, longest = int(lengths.sum()) * tiling.kv_heads, int(lengths.max())
    candidates = {longest}
    for waves in WAVES:
        length = -(-total // (tiling.programs * waves))
        candidates.add(min(longest, max(least_piece(tiling), -(-length // tiling.block_n) * tiling.block_n)))

    def ends(candidate: int) -> float:
        items = int(_per(lengths, candidate).sum()) * tiling.kv_heads
        if items <= tiling.programs:
            return candidate + FIXED_COST
        return (total + items * FIXED_COST) / tiling.programs + candidate / 2

    return min(sorted(candidates, reverse=True), key=ends)


def _ragged(counts: Integers) -> tuple[Integers, Integers]:
    """For `counts[i]` elements of each i: (i, number of the element among those of i), int64 [sum of counts]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _ordered(items: Integers) -> Integers:
    """Longest first, then by place and first column, as in `plan_work`."""
    return items[np.lexsort((items[:, 4], items[:, 3], items[:, 4] - items[:, 7]))]


def _per(x: Integers, size: Integers | int) -> Integers:
    """x / size, rounded up."""
    found: Integers = -(-x // size)
    return found


def _up(x: Integers, multiple: int) -> Integers:
    """x rounded up to a multiple."""
    return _per(x, multiple) * multiple
