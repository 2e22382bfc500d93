"""Which block of rows meets which columns, cut so that a device's processors are evenly busy.

It owns planning in plain integers: the same for decode, windows and the diagonal; it must not touch a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longspan.cache.pages import Span
from longspan.plan.reach import QueryRun

_SHORT_SPAN = 1024  # tokens; neighbours shorter than this are gathered, by an index of slots, into one range
_LEAST_PIECE = 256  # columns: less is not worth a partial of its own
_FIXED_COST = 96  # columns that could be read while a program starts and ends
_WAVES = (1, 2, 4)


class Item(NamedTuple):
    """Rows [first, first + size), counted as tokens × query heads of a KV head from token `row` on, against columns.

    Columns lie in [start, stop); in [full_start, full_stop), whole tiles, every row sees every column. Column c is
    slot `place` + c, or is named by the index at `place` + c. A result goes to row `partial` of the partials, or
    straight to its place if that is -1. A size of 0 is no work.
    """

    row: int
    first: int
    size: int
    place: int
    start: int
    full_start: int
    full_stop: int
    stop: int
    partial: int


class Split(NamedTuple):
    """Rows as in `Item` whose result is the merge of partials [part, last)."""

    row: int
    first: int
    size: int
    part: int
    last: int


class Stretch(NamedTuple):
    """Columns [start, stop) whose places follow each other."""

    start: int
    stop: int
    place: int
    gathered: bool


@dataclass
class Slots:
    """The index of gathered columns: the slots of `spans`, `length` in all, one behind the other."""

    spans: list[Span] = field(default_factory=list)
    length: int = 0

    def add(self, spans: Sequence[Span]) -> int:
        """More of them; where they begin."""
        at = self.length
        self.spans += spans
        self.length += sum(span.length for span in spans)
        return at


@dataclass(frozen=True)
class Sight:
    """Rows [row, row + len(lows)): row i sees columns [lows[i], highs[i]) as far as stretches hold them."""

    row: int
    stretches: tuple[Stretch, ...]
    lows: Sequence[int]
    highs: Sequence[int]


@dataclass(frozen=True)
class Tiling:
    """How one launch is cut: `group` query heads to each of `kv_heads`, tiles, programs that run at a time."""

    group: int
    kv_heads: int
    block_m: int
    block_n: int
    programs: int


@dataclass(frozen=True)
class Work:
    """What a launch does: items over adjacent slots, items over indexed ones, and the rows to reduce."""

    adjacent: list[Item]
    gathered: list[Item]
    splits: list[Split]
    bounds: list[tuple[int, int]]
    index: Slots
    partials: int


class _Block(NamedTuple):
    """Rows of one item, their ranges of columns, and the columns all of them see: [full_low, full_high)."""

    row: int
    first: int
    size: int
    ranges: list[Stretch]
    full_low: int
    full_high: int


@dataclass
class _Draft:
    items: list[Item] = field(default_factory=list)
    gathered: list[Item] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    partials: int = 0


def sights_of_runs(runs: Sequence[QueryRun]) -> tuple[list[Sight], Slots]:
    """Off the diagonal: what runs see, and the index of slots of short spans."""
    index = Slots()
    seen: dict[tuple[Span, ...], tuple[Stretch, ...]] = {}  # segments of one request may see the same
    sights: list[Sight] = []
    for run in runs:
        if run.spans not in seen:
            seen[run.spans] = tuple(_stretches(run.spans, index))
        lows = (0,) * run.length if run.window_starts is None else run.window_starts
        sights.append(Sight(run.row, seen[run.spans], lows, (run.tokens,) * run.length))
    return sights, index


def sights_of_diagonal(tokens: int, window: int | None) -> list[Sight]:
    """Every row sees the tokens up to its own, or the last `window` of them."""
    lows = (0,) * tokens if window is None else [max(0, row + 1 - window) for row in range(tokens)]
    return [Sight(0, (Stretch(0, tokens, 0, False),), lows, range(1, tokens + 1))]


def plan_work(sights: Sequence[Sight], index: Slots, rows: int, tiling: Tiling) -> Work:
    """Every row of `rows` is in one block of one item or more: rows of no sight get an item without columns.

    A row is in one sight at most.
    """
    bounds = [(0, 0)] * rows
    for sight in sights:
        bounds[sight.row : sight.row + len(sight.lows)] = zip(sight.lows, sight.highs, strict=True)
    blocks = [block for sight in [*sights, *_blind(sights, rows)] for block in _blocks(sight, tiling)]
    longest = _piece_length(blocks, tiling)
    draft = _Draft()
    for block in blocks:
        _add(draft, block, longest, tiling.block_n)
    for items in (draft.items, draft.gathered):  # the longest first evens out the end; neighbours share columns
        items.sort(key=lambda item: (item.start - item.stop, item.place, item.start))
    return Work(draft.items, draft.gathered, draft.splits, bounds, index, draft.partials)


def most_blocks(rows: int, tiling: Tiling) -> int:
    """Blocks that `rows` rows in runs of any length can need."""
    return rows * -(-tiling.group // tiling.block_m)


def most_items(rows: int, tiling: Tiling) -> int:
    """Items that decode rows over one range of slots each can need: the room in a plan that is refilled."""
    return most_blocks(rows, tiling) + max(_WAVES) * -(-tiling.programs // tiling.kv_heads)


def _stretches(spans: Sequence[Span], index: Slots) -> Iterator[Stretch]:
    """Long spans are read in place; short ones side by side are one stretch of the index."""
    column = 0
    short: list[Span] = []
    for span in [*spans, None]:
        if span is not None and span.length < _SHORT_SPAN:
            short.append(span)
            continue
        if len(short) == 1:
            yield Stretch(column, column + short[0].length, short[0].slot - column, False)
        elif short:
            place = index.add(short) - column
            yield Stretch(column, index.length - place, place, True)
        column += sum(piece.length for piece in short)
        short = []
        if span is not None:
            yield Stretch(column, column + span.length, span.slot - column, False)
            column += span.length


def _blind(sights: Sequence[Sight], rows: int) -> Iterator[Sight]:
    """Rows of no sight."""
    at = 0
    for sight in sorted(sights, key=lambda sight: sight.row):
        if sight.row > at:
            yield Sight(at, (), (0,) * (sight.row - at), (0,) * (sight.row - at))
        at = max(at, sight.row + len(sight.lows))
    if rows > at:
        yield Sight(at, (), (0,) * (rows - at), (0,) * (rows - at))


def _blocks(sight: Sight, tiling: Tiling) -> Iterator[_Block]:
    packed = len(sight.lows) * tiling.group
    for first in range(0, packed, tiling.block_m):
        count = min(tiling.block_m, packed - first)
        tokens = slice(first // tiling.group, (first + count - 1) // tiling.group + 1)
        lows, highs = sight.lows[tokens], sight.highs[tokens]
        low, high = min(lows), max(highs)
        ranges = [
            Stretch(max(low, s.start), min(high, s.stop), s.place, s.gathered)
            for s in sight.stretches
            if s.start < high and low < s.stop
        ]
        yield _Block(sight.row, first, count, [r for r in ranges if r.start < r.stop], max(lows), min(highs))


def _piece_length(blocks: Sequence[_Block], tiling: Tiling) -> int:
    """Columns of the longest item: of a few candidates the one whose launch should end first."""
    lengths = [r.stop - r.start for block in blocks for r in block.ranges]
    if not lengths:
        return tiling.block_n
    total = sum(lengths) * tiling.kv_heads
    longest = max(lengths)
    candidates = {longest}
    for waves in _WAVES:
        length = -(-total // (tiling.programs * waves))
        candidates.add(min(longest, max(_LEAST_PIECE, _up(length, tiling.block_n))))

    def ends(candidate: int) -> float:
        items = sum(-(-length // candidate) for length in lengths) * tiling.kv_heads
        if items <= tiling.programs:
            return candidate + _FIXED_COST
        return (total + items * _FIXED_COST) / tiling.programs + candidate / 2

    return min(sorted(candidates, reverse=True), key=ends)


def _add(draft: _Draft, block: _Block, longest: int, tile: int) -> None:
    """Cut a block's ranges into even pieces; several pieces, or none, are no direct result."""
    pieces: list[Stretch] = []
    for r in block.ranges:
        length = r.stop - r.start
        size = _up(-(-length // -(-length // longest)), tile)
        pieces += [Stretch(at, min(at + size, r.stop), r.place, r.gathered) for at in range(r.start, r.stop, size)]
    part = draft.partials if len(pieces) > 1 else -1
    if len(pieces) > 1:
        draft.partials += len(pieces)
        draft.splits.append(Split(block.row, block.first, block.size, part, draft.partials))
    for number, piece in enumerate(pieces or [Stretch(0, 0, 0, False)]):
        full_start = min(_up(max(block.full_low - piece.start, 0), tile), _up(piece.stop - piece.start, tile))
        full_start += piece.start
        whole = max(min(block.full_high, piece.stop) - full_start, 0) // tile * tile
        item = Item(
            block.row, block.first, block.size, piece.place, piece.start,
            full_start, full_start + whole, piece.stop, part + number if part >= 0 else -1,
        )  # fmt: skip
        (draft.gathered if piece.gathered else draft.items).append(item)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
