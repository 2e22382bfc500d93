"""The view of a step that only decodes, one token of each request: what `rank_view` gives, in less time.

It owns the shortcuts that such a step allows. It computes with plain integers and must not touch tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

from longspan.cache.pages import ShardPages, clip_spans
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan, window_start
from longspan.plan.reach import Place, QueryBlock, QueryRun, Reach
from longspan.plan.view import PendingRow, PhaseView, RankView, SampleRequest, WriteRun

T = TypeVar("T")


class _Lazy(Sequence[T], Generic[T]):
    """Records in lists: one is only made when it is asked for; who needs less reads the lists."""

    @abstractmethod
    def _made(self, number: int) -> T:
        """The record of this number."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._made(number) for number in range(*index.indices(len(self)))]
        return self._made(range(len(self))[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._made, range(len(self)))


@dataclass(frozen=True)
class DecodeRuns(_Lazy[QueryRun]):
    """Runs of one row each."""

    # the row of each run
    rows: list[int]
    # the pages of each run's request on this shard
    pages: list[ShardPages]
    # how many of the request's first tokens on this shard the row's window leaves out
    firsts: list[int]
    # the row sees the request's tokens on this shard up to this one
    stops: list[int]
    # tokens of a page
    page_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def _made(self, number: int) -> QueryRun:
        first, stop = self.firsts[number], self.stops[number]
        spans = self.pages[number].spans(stop, self.page_size)
        return QueryRun(self.rows[number], 1, tuple(clip_spans(spans, first, stop)) if first else spans)


@dataclass(frozen=True)
class DecodeWrites(_Lazy[WriteRun]):
    """Writes of one row each."""

    # the rows
    rows: list[int]
    # the slot of each
    slots: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def _made(self, number: int) -> WriteRun:
        return WriteRun(self.rows[number], self.slots[number], 1)


@dataclass(frozen=True)
class DecodePending(_Lazy[PendingRow]):
    """Rows whose tokens the scheduler does not know."""

    # the rows
    rows: Sequence[int]
    # the request of each
    names: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def _made(self, number: int) -> PendingRow:
        return PendingRow(self.rows[number], self.names[number])


@dataclass(frozen=True)
class DecodeSamples(_Lazy[SampleRequest]):
    """Every row is sampled."""

    # the request of each row
    names: list[str]
    # the same as the rank knows them
    requests: list[KnownRequest]
    # index of the sampled token in each request's output
    positions: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def _made(self, number: int) -> SampleRequest:
        return SampleRequest(number, self.names[number], self.positions[number])


def decode_view(
    plan: StepPlan,
    requests: Mapping[str, KnownRequest],
    place: Place,
    windows: Sequence[int | None],
    schedule: str | None,
) -> RankView:
    """The same as `rank_view`, for a plan whose segments decode and sample one token each.

    All rows are local, or all travel under `schedule`, which moves queries. Arguments are as there.
    """
    by_pcp: list[list[Segment]] = [[] for _ in place.shards_of_pcp]
    for segment in plan.segments:
        by_pcp[segment.pcp].append(segment)
    mine = by_pcp[place.pcp]
    names = [segment.request_id for segment in mine]
    rows: Sequence[int] = range(len(mine))
    if not all(segment.pending for segment in mine):
        rows = [row for row, segment in enumerate(mine) if segment.pending]
    known = [requests[name] for name in names]
    starts = [segment.start for segment in mine]
    seen = [_seen(block, requests, place.shard) for block in (by_pcp if schedule else [mine])]
    groups: list[Reach] = []
    for local, window in zip(plan.decode_schedules, windows, strict=True):
        runs = [each.runs(window) for each in seen]
        if schedule is None:
            groups.append(Reach(local, len(mine), runs[0], (QueryBlock(0, ()),) * len(by_pcp), (), ()))
        else:
            blocks = tuple(QueryBlock(len(block), own) for block, own in zip(by_pcp, runs, strict=True))
            groups.append(Reach(schedule, 0, (), blocks, (), ()))
    return RankView(
        token_ids=[segment.token_ids[0] if segment.token_ids else 0 for segment in mine],
        positions=starts,
        writes=seen[place.pcp if schedule else 0].writes,
        phases=(PhaseView(0, len(mine), (), tuple(groups)),),
        samples=DecodeSamples(
            names, known, [start + 1 - request.num_prompt for start, request in zip(starts, known, strict=True)]
        ),
        scored=(),
        pending=DecodePending(rows, names if len(rows) == len(names) else [names[row] for row in rows]),
    )


@dataclass(frozen=True)
class _Seen:
    """What rows see of one shard without a window, and where those whose page is on it are written."""

    # position of each row
    starts: list[int]
    # its request's pages on the shard
    pages: list[ShardPages]
    # number of the request's tokens there, up to the row's own
    stops: list[int]
    # tokens of a page
    page_size: int
    # the rows whose page is on the shard
    writes: DecodeWrites

    def runs(self, window: int | None) -> DecodeRuns:
        """What the rows see with this window. A row that sees nothing has no run."""
        firsts, pages, stops, size = [0] * len(self.stops), self.pages, self.stops, self.page_size
        if window is not None:
            firsts = [
                each.visible(window_start(start, window), size) for each, start in zip(pages, self.starts, strict=True)
            ]
        elif all(stops):
            return DecodeRuns(list(range(len(stops))), pages, firsts, stops, size)
        rows = [row for row, (first, stop) in enumerate(zip(firsts, stops, strict=True)) if first < stop]
        return DecodeRuns(
            rows, [pages[row] for row in rows], [firsts[row] for row in rows], [stops[row] for row in rows], size
        )


def _seen(segments: Sequence[Segment], requests: Mapping[str, KnownRequest], shard: int) -> _Seen:
    """What the rows of segments see of a shard."""
    starts = [segment.start for segment in segments]
    tables = [requests[segment.request_id].table for segment in segments]
    pages = [table.on(shard) for table in tables]
    rows: list[int] = []
    slots: list[int] = []
    stops: list[int] = []
    for row, start in enumerate(starts):  # a plain loop, because there are hundreds
        first, stop, slot, before = pages[row].page
        if not first <= start < stop:
            first, stop, slot, before = tables[row].page_on(shard, start)
        if slot is None:
            stops.append(before)
        else:
            rows.append(row)
            slots.append(slot + start)
            stops.append(before + start + 1 - first)
    return _Seen(starts, pages, stops, tables[0].page_size if tables else 1, DecodeWrites(rows, slots))
