"""The work of a launch: blocks of query rows against ranges of columns, cut so that all processors are evenly busy.

A column is a cached token, or a new one on the diagonal. This module owns the planning, which is the same for decode,
windows and the diagonal. It computes with plain integers and must not use a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.cache.pages import Span
from longspan.plan.reach import QueryRun

# tokens; adjacent spans shorter than this are read as one range, through an index of slots. Contexts that grow beside
# each other have their last pages apart, and two ranges of a row cost more than an index
SHORT_SPAN = 4096
_LEAST_PIECE = 256  # fewest columns of an item whose rows other items share
_LEAST_OF_FEW = 128  # the same for few rows, which are merged sooner
_FEW_ROWS = 32  # of a tile
_PIECE_COST = 170  # time to start and end an item and to merge its result, in columns that could be read meanwhile
_WAVES = (1, 2, 4)  # candidates for the number of items that each processor computes in turn
_EQUAL_PARTS = (1, 2, 3, 4)  # candidates for the number of items that the longest range is cut into


class Item(NamedTuple):
    """A block of packed rows against a range of columns, for one program and KV head.

    The query heads of a KV head are packed: packed row p is token `row` + p // group, head p % group of the KV head.
    """

    # token of the run's first row
    row: int
    # first packed row
    first: int
    # number of packed rows; 0 if there is no work
    size: int
    # column c is slot `place` + c, or of a gathered range the slot at `place` + c of the index
    place: int
    # first column
    start: int
    # first column of the whole tiles in which every row sees every column
    full_start: int
    # column after these tiles
    full_stop: int
    # column after the last
    stop: int
    # where the result goes: a block of the partial results, or the final result if this is -1
    partial: int
    # first partial result of the same rows, or -1
    part: int
    # partial result of the same rows after the last, or -1
    last: int


class Split(NamedTuple):
    """Packed rows, as in `Item`, whose result is the merge of several partial results."""

    # token of the run's first row
    row: int
    # first packed row
    first: int
    # number of packed rows
    size: int
    # first partial result
    part: int
    # partial result after the last
    last: int


class Stretch(NamedTuple):
    """Columns that are adjacent in the pool, or in the index of gathered slots."""

    # first column
    start: int
    # column after the last
    stop: int
    # as in `Item`
    place: int
    # whether `place` counts in the index
    gathered: bool


@dataclass
class Slots:
    """The index of gathered columns: the slots of concatenated spans."""

    # the spans
    spans: list[Span] = field(default_factory=list)
    # number of slots in them
    length: int = 0

    def add(self, spans: Sequence[Span]) -> int:
        """Append spans. Returns the place at which they begin."""
        at = self.length
        self.spans += spans
        self.length += sum(span.length for span in spans)
        return at


@dataclass(frozen=True)
class VisibleColumns:
    """The columns that adjacent rows (tokens) see. A row sees only columns that are in some stretch."""

    # first row
    row: int
    # where the columns are, in order
    stretches: tuple[Stretch, ...]
    # for each row, the first column that it sees
    lows: Sequence[int]
    # for each row, the column after the last that it sees
    highs: Sequence[int]


@dataclass(frozen=True)
class Tiling:
    """What the cutting of one launch depends on."""

    # query heads of each KV head
    group: int
    # KV heads
    kv_heads: int
    # packed rows of a tile
    block_m: int
    # columns of a tile
    block_n: int
    # programs that run on the device at a time
    programs: int


@dataclass(frozen=True)
class Work:
    """The work of one launch."""

    # items over adjacent slots
    adjacent: list[Item]
    # items over slots that the index names
    gathered: list[Item]
    # rows that several items share
    splits: list[Split]
    # for each row (token), the columns [low, high) that it sees
    bounds: list[tuple[int, int]]
    # the index
    index: Slots
    # number of blocks of partial results
    partials: int


class _Block(NamedTuple):
    """The packed rows of a tile, before their columns are cut into items."""

    # token of the run's first row
    row: int
    # first packed row
    first: int
    # number of packed rows
    size: int
    # columns that some row sees
    ranges: list[Stretch]
    # first column that all rows see
    full_low: int
    # column after the last that all rows see
    full_high: int


@dataclass
class _Draft:
    """The parts of a `Work` that are collected block by block."""

    # items over adjacent slots
    items: list[Item] = field(default_factory=list)
    # items over slots that the index names
    gathered: list[Item] = field(default_factory=list)
    # rows that several items share
    splits: list[Split] = field(default_factory=list)
    # number of blocks of partial results so far
    partials: int = 0


def visible_in_runs(runs: Sequence[QueryRun], short: int = SHORT_SPAN) -> tuple[list[VisibleColumns], Slots]:
    """(what runs see, the index of slots of their spans of less than `short` tokens)."""
    index = Slots()
    seen: dict[tuple[Span, ...], tuple[Stretch, ...]] = {}  # segments of one request may see the same
    visible: list[VisibleColumns] = []
    for run in runs:
        if run.spans not in seen:
            seen[run.spans] = tuple(stretches(run.spans, index, short))
        lows = (0,) * run.length if run.window_starts is None else run.window_starts
        visible.append(VisibleColumns(run.row, seen[run.spans], lows, run.ends))
    return visible, index


def visible_on_diagonal(segments: Sequence[tuple[int, int]], window: int | None) -> list[VisibleColumns]:
    """What segments (first row, length) see on the diagonal: the tokens up to the own one, or `window` of them."""
    visible: list[VisibleColumns] = []
    for first, tokens in segments:
        lows = (0,) * tokens if window is None else [max(0, row + 1 - window) for row in range(tokens)]
        visible.append(VisibleColumns(first, (Stretch(0, tokens, first, False),), lows, range(1, tokens + 1)))
    return visible


def plan_work(visible: Sequence[VisibleColumns], index: Slots, rows: int, tiling: Tiling) -> Work:
    """The work of one launch over `rows` rows (tokens). A row may be in one range of rows at most.

    Other rows get an item without columns, which writes the identity.
    """
    bounds = [(0, 0)] * rows
    for seen in visible:
        bounds[seen.row : seen.row + len(seen.lows)] = zip(seen.lows, seen.highs, strict=True)
    blocks = [block for seen in [*visible, *_without_columns(visible, rows)] for block in _blocks(seen, tiling)]
    longest = _piece_length(blocks, tiling)
    draft = _Draft()
    for block in blocks:
        _add(draft, block, longest, tiling.block_n)
    for items in (draft.items, draft.gathered):  # longest first, to end evenly; equal columns adjacent, to share caches
        items.sort(key=lambda item: (item.start - item.stop, item.place, item.start))
    return Work(draft.items, draft.gathered, draft.splits, bounds, index, draft.partials)


def least_piece(tiling: Tiling) -> int:
    """Fewest columns of an item whose rows other items share."""
    return _LEAST_OF_FEW if tiling.block_m <= _FEW_ROWS else _LEAST_PIECE


def most_blocks(rows: int, tiling: Tiling) -> int:
    """Most blocks for `rows` rows, in runs of any length."""
    return rows * -(-tiling.group // tiling.block_m)


def most_items(rows: int, tiling: Tiling) -> int:
    """Most items for `rows` decode rows with one range of slots each: the capacity of a plan that is refilled."""
    return most_blocks(rows, tiling) + max(_WAVES) * -(-tiling.programs // tiling.kv_heads)


def stretches(spans: Sequence[Span], index: Slots, short: int = SHORT_SPAN) -> Iterator[Stretch]:
    """The stretches of a run's spans: long spans are read in place, adjacent ones below `short` are added to the index.

    A short span between long ones is read in place too.
    """
    column = 0
    few: list[Span] = []
    for span in [*spans, None]:
        if span is not None and span.length < short:
            few.append(span)
            continue
        if len(few) == 1:
            yield Stretch(column, column + few[0].length, few[0].slot - column, False)
        elif few:
            place = index.add(few) - column
            yield Stretch(column, index.length - place, place, True)
        column += sum(piece.length for piece in few)
        few = []
        if span is not None:
            yield Stretch(column, column + span.length, span.slot - column, False)
            column += span.length


def _without_columns(visible: Sequence[VisibleColumns], rows: int) -> Iterator[VisibleColumns]:
    """Empty lists of columns, for the rows that are in no range of `visible`."""
    at = 0
    for seen in sorted(visible, key=lambda seen: seen.row):
        if seen.row > at:
            yield VisibleColumns(at, (), (0,) * (seen.row - at), (0,) * (seen.row - at))
        at = max(at, seen.row + len(seen.lows))
    if rows > at:
        yield VisibleColumns(at, (), (0,) * (rows - at), (0,) * (rows - at))


def _blocks(seen: VisibleColumns, tiling: Tiling) -> Iterator[_Block]:
    """Cut the packed rows of a range into tiles."""
    packed = len(seen.lows) * tiling.group
    for first in range(0, packed, tiling.block_m):
        count = min(tiling.block_m, packed - first)
        tokens = slice(first // tiling.group, (first + count - 1) // tiling.group + 1)
        lows, highs = seen.lows[tokens], seen.highs[tokens]
        low, high = min(lows), max(highs)
        ranges = [
            Stretch(max(low, s.start), min(high, s.stop), s.place, s.gathered)
            for s in seen.stretches
            if s.start < high and low < s.stop
        ]
        yield _Block(seen.row, first, count, [r for r in ranges if r.start < r.stop], max(lows), min(highs))


def _piece_length(blocks: Sequence[_Block], tiling: Tiling) -> int:
    """Most columns of an item: of a few candidates the one with which the launch should end first."""
    lengths = [r.stop - r.start for block in blocks for r in block.ranges]
    if not lengths:
        return tiling.block_n
    total = sum(lengths) * tiling.kv_heads

    def ends(candidate: int) -> float:
        items = sum(-(-length // candidate) for length in lengths) * tiling.kv_heads
        return time_of(candidate, items, total, tiling)

    return min(piece_lengths(total, max(lengths), tiling), key=ends)


def piece_lengths(total: int, longest: int, tiling: Tiling) -> list[int]:
    """Candidates for the most columns of an item, the longest first, for ranges of `total` columns in all KV heads.

    They keep all programs busy a few times, or cut the longest range into equal parts, so that a few ranges of one
    length fill whole rounds.
    """
    tile = tiling.block_n
    shares = {max(least_piece(tiling), _up(-(-total // (tiling.programs * waves)), tile)) for waves in _WAVES}
    parts = {_up(-(-longest // count), tile) for count in _EQUAL_PARTS}
    shortest = min(shares)  # more items may not fit into a plan that is refilled
    return sorted({min(longest, length) for length in shares | parts if length >= shortest}, reverse=True)


def time_of(longest: int, items: int, total: int, tiling: Tiling) -> float:
    """Estimated time of a launch, in columns that a program reads meanwhile.

    `items` are (item, KV head) pairs of at most `longest` columns, of `total` columns together. Longest come first, so
    that others fill the end. Fitted to an H100: 32 rows of mixed lengths took 59 µs in pieces of 2,048 columns, where
    pieces of 640 took 65.
    """
    if items <= tiling.programs:
        return longest + _PIECE_COST
    return (total + items * _PIECE_COST) / tiling.programs + longest / 16


def _add(draft: _Draft, block: _Block, longest: int, tile: int) -> None:
    """Cut the ranges of a block into items of at most `longest` columns, of equal length in each range.

    Several items write partial results and are joined by a split; a single item writes the final result. A block
    without ranges gets one item without columns.
    """
    pieces: list[Stretch] = []
    for r in block.ranges:
        length = r.stop - r.start
        size = _up(-(-length // -(-length // longest)), tile)
        pieces += [Stretch(at, min(at + size, r.stop), r.place, r.gathered) for at in range(r.start, r.stop, size)]
    part, last = -1, -1
    if len(pieces) > 1:
        part, last = draft.partials, draft.partials + len(pieces)
        draft.partials = last
        draft.splits.append(Split(block.row, block.first, block.size, part, last))
    for number, piece in enumerate(pieces or [Stretch(0, 0, 0, False)]):
        full_start = min(_up(max(block.full_low - piece.start, 0), tile), _up(piece.stop - piece.start, tile))
        full_start += piece.start
        whole = max(min(block.full_high, piece.stop) - full_start, 0) // tile * tile
        item = Item(
            block.row, block.first, block.size, piece.place, piece.start,
            full_start, full_start + whole, piece.stop, part + number if part >= 0 else -1, part, last,
        )  # fmt: skip
        (draft.gathered if piece.gathered else draft.items).append(item)


def _up(x: int, multiple: int) -> int:
    """x rounded up to a multiple."""
    return -(-x // multiple) * multiple
