"""Where the columns of decode rows are: kept from step to step, because a context changes by one token a step.

It owns the ranges of columns of each request, and an index of slots on the device that grows with them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
_FEW_REQUESTS = 32  # so few are looked up, not moved
_FORGET = 4096  # requests that are remembered although no step has used them since
_NEW = -2  # in place of a run's number in an earlier step: no number follows it
_Ranges = tuple[Integers, Integers, Integers, Integers, Integers, Integers]
"""Counts, starts, places, whether gathered, above and until, as in `DecodeColumns`."""


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
        if before is None or before.age != self._age:
            before = _no_columns(self._age)
        if before.pages != runs.pages and len(self._requests) > len(runs) + _FORGET:
            self._forget()
            return None
        missed: list[int] | None = []
        for _ in range(2):  # those that are missed are found now, so nothing is missed the second time
            found = None if missed is None else self._arranged(runs, before, missed)
            missed = None if found is None else self._missed(runs, found)
            if found is not None and missed == []:
                self._send()
                return found
        self._forget()
        return None

    def _arranged(self, runs: DecodeRuns, before: DecodeColumns, anew: Sequence[int]) -> DecodeColumns | None:
        """The columns of `before` in the order of `runs`; those of others, and of the runs `anew`, are found now.

        None if the index is full.
        """
        rows, lows, highs = map(_array, (runs.rows, runs.firsts, runs.stops))
        if not runs.pages:
            before = _no_columns(self._age)
        if before.pages == runs.pages and not anew:
            same = np.array_equal(rows, before.rows)
            # without the same rows the ranges are others: those who compare must see it
            starts = before.starts if same else before.starts.copy()
            return replace(
                before, rows=rows, lows=lows, highs=highs, starts=starts, requests=before.requests.copy(),
                above=before.above.copy(), until=before.until.copy(),
            )  # fmt: skip
        found = self._parts(runs, before, anew)
        if found is None:
            return None
        parts, requests = found
        one = len(parts) == 1
        counts, starts, places, gathered, above, until = (
            parts[0] if one else (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        )
        return DecodeColumns(
            rows, lows, highs, counts, starts, places, gathered, requests, runs.pages, above, until, self._age
        )

    def _parts(
        self, runs: DecodeRuns, before: DecodeColumns, anew: Sequence[int]
    ) -> tuple[list[_Ranges], list[_Request]] | None:
        """The ranges of `runs` in parts, and the requests: see `_arranged`."""
        if len(runs) <= _FEW_REQUESTS:
            found = [self._known(*one, runs.page_size) for one in zip(runs.pages, runs.stops, strict=True)]
            known_ones = [one for one in found if one is not None]
            return ([_ranges_of(known_ones)], known_ones) if len(known_ones) == len(found) else None
        number_of = {pages: number for number, pages in enumerate(before.pages)}
        old = _array([number_of.get(pages, _NEW) for pages in runs.pages])
        if anew:
            old[anew] = _NEW
        cuts = [0, *(np.flatnonzero(np.diff(old) != 1) + 1).tolist(), len(old)]
        ends = np.cumsum(before.counts)
        parts: list[_Ranges] = []
        requests: list[_Request] = []
        fresh: list[_Request] = []
        for run, stop in pairwise(cuts):
            first = int(old[run])
            if first == _NEW:
                known = self._known(runs.pages[run], runs.stops[run], runs.page_size)
                if known is None:
                    return None
                fresh.append(known)
            if fresh and (first != _NEW or stop == len(old)):
                parts.append(_ranges_of(fresh))
                requests += fresh
                fresh = []
            if first != _NEW:
                parts.append(_part(before, first, first + stop - run, ends))
                requests += before.requests[first : first + stop - run]
        return parts, requests

    def _missed(self, runs: DecodeRuns, found: DecodeColumns) -> list[int] | None:
        """The runs whose ranges are others than in `found` now, which is changed where nothing but its bounds have.

        None if the index is full.
        """
        missed: list[int] = []
        for run in np.flatnonzero((found.highs <= found.above) | (found.highs > found.until)).tolist():
            old, known = found.requests[run], self._known(runs.pages[run], runs.stops[run], runs.page_size)
            if known is None:
                return None
            if (known.starts, known.places, known.gathered) != (old.starts, old.places, old.gathered):
                missed.append(run)
            found.requests[run], found.above[run], found.until[run] = known, known.above, known.until
        return missed

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


def _no_columns(age: int) -> DecodeColumns:
    none = _array([])
    return DecodeColumns(none, none, none, none, none, none, none, [], [], none, none, age)


def _part(columns: DecodeColumns, first: int, stop: int, ends: Integers) -> _Ranges:
    """Those of the runs [first, stop); `ends` [runs] are the numbers of ranges up to the end of each run."""
    low, high = int(ends[first] - columns.counts[first]), int(ends[stop - 1])
    of_run, of_range = slice(first, stop), slice(low, high)
    return (
        columns.counts[of_run], columns.starts[of_range], columns.places[of_range], columns.gathered[of_range],
        columns.above[of_run], columns.until[of_run],
    )  # fmt: skip


def _ranges_of(requests: Sequence[_Request]) -> _Ranges:
    return (
        _array([len(one.starts) for one in requests]),
        _array([x for one in requests for x in one.starts]),
        _array([x for one in requests for x in one.places]),
        _array([x for one in requests for x in one.gathered]),
        _array([one.above for one in requests]),
        _array([one.until for one in requests]),
    )


def _array(values: Sequence[int]) -> Integers:
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
