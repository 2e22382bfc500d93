"""Which parts of a step are large enough for a call of cuDNN's attention, in few sizes of rows and columns.

It owns the division of runs into calls and the rest; it must not know tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longspan.cache.pages import Span, clip_spans
from longspan.plan.reach import QueryRun

MERGED = 4  # most parts of one merge: its kernel is compiled for each number of parts
_LEAST_NEW = 0.75  # of the rows of a block that begins within the one before


@dataclass(frozen=True)
class LibraryUse:
    """The sizes of calls of the library. They are few, because it plans each of them, for 0.05 to 3.7 s on an H100."""

    # rows of a call, ascending
    rows: tuple[int, ...] = (2048, 4096, 8192)
    # columns of a call that all rows see, ascending; fewer do not pay, as its result is written and merged
    columns: tuple[int, ...] = (8192, 32768, 131072)
    # most spans of a piece: several are copied together, one after the other
    spans: int = 64

    @property
    def steps(self) -> tuple[tuple[int, int, bool], ...]:
        """See `AttentionBackend.long_steps`: steps that take all sizes, and merge all numbers of parts."""
        adjacent = [(rows, columns, False) for rows in self.rows for columns in self.columns]
        merged = [(self.rows[0], count * self.columns[0], False) for count in range(2, MERGED)]
        return (*adjacent, *merged, *((rows, self.columns[0], True) for rows in self.rows))


@dataclass(frozen=True)
class LibraryPiece:
    """Columns for one call: all rows of its block see all of them, or with `causal` those up to their own."""

    # the columns
    spans: tuple[Span, ...]
    # whether the columns are the rows' own tokens
    causal: bool = False


@dataclass(frozen=True)
class LibraryBlock:
    """Rows [row, row + length) of one run for the library, as many as a call has."""

    # first row
    row: int
    # number of rows
    length: int
    # first row whose result is used: those before it are in the block before
    first: int
    # what they see by calls of the library
    pieces: tuple[LibraryPiece, ...]

    @property
    def used(self) -> slice:
        """The rows whose results are used."""
        return slice(self.first, self.row + self.length)


def divide(runs: Sequence[QueryRun], use: LibraryUse) -> tuple[list[LibraryBlock], list[QueryRun]]:
    """(the blocks of rows for the library, the runs over everything else). No row is in two of the runs."""
    blocks: list[LibraryBlock] = []
    rest: list[QueryRun] = []
    for run in runs:
        mine = list(_blocks_of(run, use)) if run.window_starts is None else []
        if not any(block.pieces for block in mine):
            rest.append(run)
            continue
        for block in mine:
            blocks += [block] if block.pieces else []
            rest += _left_of(run, block)
        stop = mine[-1].row + mine[-1].length
        if stop < run.row + run.length:
            rest.append(QueryRun(stop, run.row + run.length - stop, run.spans, None, run.causal))
    return blocks, rest


def _left_of(run: QueryRun, block: LibraryBlock) -> Iterator[QueryRun]:
    """What the rows of a block see beside its pieces."""
    taken = sum(span.length for piece in block.pieces if not piece.causal for span in piece.spans)
    causal = run.causal and not any(piece.causal for piece in block.pieces)
    stop = run.tokens
    if run.causal:  # up to the tokens of the block, or to those of its last row
        stop += block.row - run.row - run.length + (block.length if causal else 0)
    spans = tuple(clip_spans(run.spans, taken, stop))
    if spans or not block.pieces:
        yield QueryRun(block.first, block.row + block.length - block.first, spans, None, causal)


def _blocks_of(run: QueryRun, use: LibraryUse) -> Iterator[LibraryBlock]:
    """The blocks of a run without window starts, with their pieces."""
    for start, length, first in row_blocks(run.length, use.rows):
        common = run.tokens - (run.length - start if run.causal else 0)  # columns that every row sees
        pieces: list[LibraryPiece] = []
        at = 0
        while (size := max((size for size in use.columns if size <= common - at), default=0)) > 0:
            spans = tuple(clip_spans(run.spans, at, at + size))
            if len(spans) > 1:  # they are copied: only a few columns at a time
                size = use.columns[0]
                spans = tuple(clip_spans(run.spans, at, at + size))
            if len(spans) > use.spans:
                break
            pieces.append(LibraryPiece(spans))
            at += size
        own = tuple(clip_spans(run.spans, common, common + length)) if run.causal else ()
        if 0 < len(own) <= use.spans:
            pieces.append(LibraryPiece(own, causal=True))
        yield LibraryBlock(run.row + start, length, run.row + first, tuple(pieces))


def row_blocks(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, number of rows, first row that is not in a block before) of blocks of some of `sizes`, ascending.

    The last one may begin before the end of the one before, so that no row is padded; rows for which that does not pay
    are in none.
    """
    at = 0
    while (size := max((size for size in sizes if size <= rows - at), default=0)) > 0:
        yield at, size, at
        at += size
    left = rows - at
    size = next((size for size in sizes if left < size <= rows), 0)
    if left and left >= size * _LEAST_NEW > 0:
        yield rows - size, size, at
