"""Where the columns of decode rows are: kept from step to step, because a context changes by one token a step.

It owns the ranges of columns of each request, and an index of slots on the device that grows with them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.attention.backends.triton.work import SHORT_SPAN, Slots, stretches
from longspan.attention.host_copy import to_device
from longspan.cache.pages import ShardPages
from longspan.plan.decode import DecodeRuns

Integers = NDArray[np.int64]
_SLACK = 8  # a request is given room in the index for 1/8 more columns than it has
_LEAST_SLACK = 64  # columns
_FORGET = 4096  # requests that are remembered although no step has used them since


@dataclass(frozen=True)
class DecodeColumns:
    """The columns that decode rows see, as arrays. A row's ranges are adjacent, in the order of rows."""

    # row (token) of each run, [runs]
    rows: Integers
    # first column that the row sees, [runs]
    lows: Integers
    # column after the last, [runs]
    highs: Integers
    # number of ranges of each run, [runs]
    counts: Integers
    # first column, `place` and whether it is gathered of each range, as in `Stretch`; a range ends where the next of
    # its row begins, or at the row's last column. [ranges]
    starts: Integers
    places: Integers
    gathered: Integers
    # what is kept of each run's request; later steps may need more columns than this covers
    requests: list[_Request]
    # the pages of each run's request
    pages: list[ShardPages]
    # `above` and `until` of the requests, [runs]
    above: Integers
    until: Integers
    # how often the table had forgotten everything
    age: int


@dataclass(slots=True)
class _Request:
    """What is kept for the pages of one request."""

    # number of pages and of runs of adjacent ones when this was made
    pages: int
    runs: int
    # this is right for rows that see more tokens than `above`, and at most `until`
    above: int
    until: int
    # as in `DecodeColumns`
    starts: list[int]
    places: list[int]
    gathered: list[int]
    # its place in the index, the columns that it has there, and those it has room for
    region: int = 0
    filled: int = 0
    room: int = 0


class ColumnTable:
    """The columns of all requests that decode on one rank.

    Columns of a request are numbered from its first token on the shard. In `index` the slot of column c is at the
    request's region + c, if any of its spans is too short to be read in place; only new columns are sent.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.index = torch.zeros(max(capacity, 1), dtype=torch.int32, device=device)
        self._capacity = capacity
        self._end = 0  # of the regions
        self._requests: dict[ShardPages, _Request] = {}
        self._places: list[Integers] = []  # entries of the index that have changed, and their slots
        self._slots: list[Integers] = []
        self._age = 0

    def of(self, runs: DecodeRuns, before: DecodeColumns | None = None) -> DecodeColumns | None:
        """The columns of `runs`, after the index was brought up to date in the order of the current stream.

        If they are those of `before`, from an earlier step, with nothing but more tokens in the last ranges, the arrays
        of the ranges are the same objects.

        None if the index is full, or too many requests are remembered; then everything is forgotten, and the next call
        begins anew. What an earlier call of the same step returned is not valid any more.
        """
        if before is not None and before.age == self._age and before.pages == runs.pages:
            moved = self._moved(runs, before)
            if moved is not None:
                return moved
        starts: list[int] = []
        places: list[int] = []
        gathered: list[int] = []
        requests: list[_Request] = []
        if len(self._requests) > len(runs) + _FORGET:
            self._forget()
            return None
        for pages, stop in zip(runs.pages, runs.stops, strict=True):
            known = self._known(pages, stop, runs.page_size)
            if known is None:
                self._forget()
                return None
            starts += known.starts
            places += known.places
            gathered += known.gathered
            requests.append(known)
        self._send()
        return DecodeColumns(
            rows=_array(runs.rows), lows=_array(runs.firsts), highs=_array(runs.stops),
            counts=_array([len(known.starts) for known in requests]),
            starts=_array(starts), places=_array(places), gathered=_array(gathered),
            requests=requests, pages=runs.pages,
            above=_array([known.above for known in requests]), until=_array([known.until for known in requests]),
            age=self._age,
        )  # fmt: skip

    def _moved(self, runs: DecodeRuns, before: DecodeColumns) -> DecodeColumns | None:
        """The columns of the same requests in a later step; None if a row or the ranges of one are not the same."""
        rows, lows, highs = map(_array, (runs.rows, runs.firsts, runs.stops))
        if not np.array_equal(rows, before.rows):
            return None
        moved = replace(before, lows=lows, highs=highs)
        beyond = np.flatnonzero((highs <= before.above) | (highs > before.until)).tolist()
        if not beyond:
            return moved
        requests, above, until = before.requests.copy(), before.above.copy(), before.until.copy()
        for run in beyond:
            old, known = requests[run], self._known(runs.pages[run], runs.stops[run], runs.page_size)
            if known is None or (known.starts, known.places, known.gathered) != (old.starts, old.places, old.gathered):
                return None
            requests[run], above[run], until[run] = known, known.above, known.until
        self._send()
        return replace(moved, requests=requests, above=above, until=until)

    def _known(self, pages: ShardPages, stop: int, page_size: int) -> _Request | None:
        """What is kept of a request, right for a row that sees `stop` tokens. None if the index is full."""
        known = self._requests.get(pages)
        if known is None or known.pages != len(pages.ordinals) or not known.above < stop <= known.until:
            known = self._update(pages, stop, known, page_size)
        return known

    def _update(self, pages: ShardPages, stop: int, known: _Request | None, page_size: int) -> _Request | None:
        """Find a request's ranges anew, and put new columns into the index. None if the index is full."""
        found = known and _grown(known, pages, stop, page_size)
        if found is None:
            found = _found(pages, stop, page_size)
        if known is not None:
            found.region, found.filled, found.room = known.region, known.filled, known.room
        if any(found.gathered):
            if not self._index(pages, found, page_size):
                return None
            found.places = [
                found.region if gathered else place
                for place, gathered in zip(found.places, found.gathered, strict=True)
            ]
        self._requests[pages] = found
        return found

    def _index(self, pages: ShardPages, made: _Request, page_size: int) -> bool:
        """Put the columns of a request that are new into the index. False if it is full."""
        columns = made.pages * page_size
        if columns > made.room:
            room = columns + max(_LEAST_SLACK, columns // _SLACK)
            if self._end + room > self._capacity:
                return False
            made.region, made.filled, made.room, self._end = self._end, 0, room, self._end + room
        if made.filled < columns:
            slots = _pool_pages(pages, made.filled // page_size)[:, None] * page_size + np.arange(page_size)
            self._places.append(np.arange(made.filled, columns) + made.region)
            self._slots.append(slots.reshape(-1))
            made.filled = columns
        return True

    def _send(self) -> None:
        """Copy changed entries to the device."""
        if not self._places:
            return
        changed = np.stack([np.concatenate(self._places), np.concatenate(self._slots)])
        self._places, self._slots = [], []
        sent = to_device(torch.from_numpy(changed), self.index.device)
        self.index.index_copy_(0, sent[0], sent[1].to(torch.int32))

    def _forget(self) -> None:
        self._requests.clear()
        self._places, self._slots, self._end = [], [], 0
        self._age += 1


def _array(values: list[int]) -> Integers:
    return np.array(values, dtype=np.int64)


def _found(pages: ShardPages, stop: int, page_size: int) -> _Request:
    """The ranges of a request's columns, for a row that sees `stop` tokens."""
    ranges = list(stretches(pages.spans(stop, page_size), Slots()))
    firsts = [first * page_size for first in pages.run_first]
    last = max(first for first in firsts if first < stop)
    until = min([first for first in firsts if first > last] + [len(pages.ordinals) * page_size])
    above, until = _same_ranges(stop, last, until)
    places, gathered = [each.place for each in ranges], [int(each.gathered) for each in ranges]
    return _Request(len(pages.ordinals), len(firsts), above, until, [each.start for each in ranges], places, gathered)


def _grown(known: _Request, pages: ShardPages, stop: int, page_size: int) -> _Request | None:
    """The same ranges, if the request has got pages that do not change them: adjacent ones, or one more short span
    behind short ones, all of which are read through the index. Else None.
    """
    last, runs = pages.run_first[-1] * page_size, len(pages.run_first)
    short = stop - last < SHORT_SPAN
    if runs == known.runs:
        same = known.above == last if short else known.above > last
    else:
        before = pages.run_first[-2] * page_size
        joins = runs == known.runs + 1 and known.above >= before and last - before < SHORT_SPAN
        same = joins and short and known.gathered[-1] != 0
    if stop <= last or not same:
        return None
    above, until = _same_ranges(stop, last, len(pages.ordinals) * page_size)
    return _Request(len(pages.ordinals), runs, above, until, known.starts, known.places, known.gathered)


def _same_ranges(stop: int, last: int, until: int) -> tuple[int, int]:
    """The ranges of a row that sees `stop` tokens are those of all rows that see more than the first number of tokens,
    and at most the second. `last` is the first token of the last span: this is read in place once it is long.
    """
    if stop - last < SHORT_SPAN:
        return last, min(until, last + SHORT_SPAN - 1)
    return last + SHORT_SPAN - 1, until


def _pool_pages(pages: ShardPages, first: int) -> Integers:
    """The indices in the pool of a request's pages from number `first` on, int64 [pages]."""
    run = bisect_right(pages.run_first, first) - 1
    firsts, indices = np.array(pages.run_first[run:]), np.array(pages.run_index[run:])
    numbers = np.arange(first, len(pages.ordinals))
    runs = np.searchsorted(firsts, numbers, side="right") - 1
    found: Integers = indices[runs] + numbers - firsts[runs]
    return found
