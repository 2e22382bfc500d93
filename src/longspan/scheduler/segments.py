"""How a chunk of one prompt is cut into segments and given to pcp ranks (idea 2).

It owns the zigzag and its fallbacks as pure functions of room and load; it must not allocate pages
or know about shards inside a TP group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Positions [start, stop) computed by the TP group of `pcp`."""

    start: int
    stop: int
    pcp: int


def split_chunk(
    start: int, stop: int, page_size: int, room: Sequence[int], load: Sequence[int], tail: int | None
) -> list[Piece]:
    """Cut positions [start, stop) into pieces in position order.

    `room[r]` is the number of pages rank r can take, `load[r]` its tokens so far in this step, `tail` the rank
    that holds the half-full page `start` lies in (None at a page's start): a page is written by one
    rank only, so whatever lies in that page is computed there. Raises ValueError without room for all.
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
    """How many tokens fit from position `start` on: the rest of its page and all free pages."""
    return -start % page_size + sum(room) * page_size


def pages_opened(start: int, stop: int, page_size: int) -> int:
    """Pages that begin in positions [start, stop); a half-full page at `start` exists already."""
    return -(-stop // page_size) - -(-start // page_size)


def fits(pieces: Sequence[Piece], page_size: int, room: Sequence[int]) -> bool:
    """Whether every rank has the pages its pieces open."""
    need = [0] * len(room)
    for piece in pieces:
        need[piece.pcp] += pages_opened(piece.start, piece.stop, page_size)
    return all(n <= free for n, free in zip(need, room, strict=True))


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """Merge neighbours of one rank."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].pcp == piece.pcp:
            piece = Piece(joined.pop().start, piece.stop, piece.pcp)
        joined.append(piece)
    return joined


def _rank_order(load: Sequence[int], tail: int | None) -> list[int]:
    return sorted(range(len(load)), key=lambda rank: (rank != tail, load[rank], rank))


def _zigzag(start: int, stop: int, page_size: int, load: Sequence[int], tail: int | None) -> list[Piece]:
    """2n pieces for n ranks, pieces i and 2n-1-i on one rank, so that causal work and pages balance.

    Empty if the chunk has fewer pages than pieces. Piece 0 continues the half-full page on its own rank, and the
    same rank's last piece leaves the next chunk's half-full page there again.
    """
    ranks = len(load)
    first, last = start // page_size, -(-stop // page_size)
    if last - first < 2 * ranks:
        return []
    order = _rank_order(load, tail)
    cuts = [first + round((last - first) * i / (2 * ranks)) for i in range(2 * ranks + 1)]
    bounds = [min(max(cut * page_size, start), stop) for cut in cuts]
    owners = [*order, *reversed(order)]
    return [Piece(a, b, r) for a, b, r in zip(bounds, bounds[1:], owners, strict=False)]


def _whole(start: int, stop: int, page_size: int, load: Sequence[int], tail: int | None) -> list[Piece]:
    """The whole chunk on one rank: the half-full page's, or the least loaded."""
    return [Piece(start, stop, _rank_order(load, tail)[0])]


def _fill(start: int, stop: int, page_size: int, room: Sequence[int], tail: int | None) -> list[Piece]:
    """Runs as long as each rank has room for, roomiest rank first: when some shards are nearly full."""
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
