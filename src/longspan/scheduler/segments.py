"""How a chunk of a prompt is cut into segments for the pcp indices (idea 2 of docs/architecture.md).

It owns the zigzag and its fallbacks, as pure functions of room and load; it must not allocate pages, nor know about
the shards inside a TP group. "Rank" in this module means a pcp index, with all ranks of its TP group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A segment before it has tokens: adjacent positions that one TP group computes."""

    # first position
    start: int
    # position after the last
    stop: int
    # index of the TP group
    pcp: int


def split_chunk(
    start: int, stop: int, page_size: int, room: Sequence[int], load: Sequence[int], tail: int | None
) -> list[Piece]:
    """Cut positions [start, stop) into pieces, in position order.

    A page has one writer. So if `start` is inside a partly filled page, the rest of this page must be computed on the
    rank that holds it.

    Args:
        start: first position of the chunk.
        stop: position after the last.
        page_size: tokens of a page.
        room: number of pages that each rank can allocate.
        load: number of tokens that each rank already computes in this step.
        tail: the rank of the partly filled page that `start` is in; None if `start` begins a page.

    Raises:
        ValueError: if the free pages cannot hold all positions.
    """
    for attempt in (_zigzag, _whole):
        pieces = attempt(start, stop, page_size, load, tail)
        if pieces and fits(pieces, page_size, room):
            return join(pieces)
    pieces = _fill(start, stop, page_size, room, tail)
    if not fits(pieces, page_size, room) or pieces[-1].stop != stop:
        raise ValueError(f"no room for positions {start}..{stop}: {list(room)} pages free")
    return join(pieces)


def room_for_chunk(start: int, page_size: int, room: Sequence[int]) -> int:
    """Number of tokens that fit from position `start` on: in the rest of its page, and in all free pages."""
    return -start % page_size + sum(room) * page_size


def pages_opened(start: int, stop: int, page_size: int) -> int:
    """Number of pages that begin in [start, stop). A page that `start` is inside of is not counted: it exists."""
    return -(-stop // page_size) - -(-start // page_size)


def fits(pieces: Sequence[Piece], page_size: int, room: Sequence[int]) -> bool:
    """Whether every rank has room for the pages that begin in its pieces."""
    need = [0] * len(room)
    for piece in pieces:
        need[piece.pcp] += pages_opened(piece.start, piece.stop, page_size)
    return all(n <= free for n, free in zip(need, room, strict=True))


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """Merge adjacent pieces of the same rank."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].pcp == piece.pcp:
            piece = Piece(joined.pop().start, piece.stop, piece.pcp)
        joined.append(piece)
    return joined


def _rank_order(load: Sequence[int], tail: int | None) -> list[int]:
    """Ranks by load, least first, but `tail` before all others."""
    return sorted(range(len(load)), key=lambda rank: (rank != tail, load[rank], rank))


def _zigzag(start: int, stop: int, page_size: int, load: Sequence[int], tail: int | None) -> list[Piece]:
    """Cut into 2n pieces for n ranks; the i-th rank computes pieces i and 2n-1-i, so that causal work is even.

    Empty if the chunk has fewer pages than pieces. The first rank is the one of the half-full page. It also computes
    the last piece, so the half-full page of the next chunk is on the same rank.
    """
    ranks = len(load)
    first, last = start // page_size, -(-stop // page_size)
    if last - first < 2 * ranks:
        return []
    order = _rank_order(load, tail)
    # pieces are whole pages, but for the ends of the chunk
    cuts = [first + round((last - first) * i / (2 * ranks)) for i in range(2 * ranks + 1)]
    bounds = [min(max(cut * page_size, start), stop) for cut in cuts]
    owners = [*order, *reversed(order)]
    return [Piece(a, b, r) for a, b, r in zip(bounds, bounds[1:], owners, strict=False)]


def _whole(start: int, stop: int, page_size: int, load: Sequence[int], tail: int | None) -> list[Piece]:
    """The whole chunk on one rank: that of the half-full page, or else the least loaded."""
    return [Piece(start, stop, _rank_order(load, tail)[0])]


def _fill(start: int, stop: int, page_size: int, room: Sequence[int], tail: int | None) -> list[Piece]:
    """Fill the ranks one after the other, the one with most room first. Used when some shards are nearly full."""
    pieces: list[Piece] = []
    at = start
    if tail is not None:
        at = min(stop, start + -start % page_size)
        pieces.append(Piece(start, at, tail))
    for rank in sorted(range(len(room)), key=lambda rank: -room[rank]):
        end = min(stop, at + room[rank] * page_size)
        if end > at:
            pieces.append(Piece(at, end, rank))
        at = end
    return pieces
