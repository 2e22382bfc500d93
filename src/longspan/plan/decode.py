"""The view of a step that only decodes, one token of each request: what `rank_view` gives, in less time.

It owns the shortcuts that such a step allows. It computes with plain integers and must not touch tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from longspan.cache.pages import ShardPages, clip_spans
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan, window_start
from longspan.plan.reach import Place, QueryBlock, QueryRun, Reach
from longspan.plan.view import PendingRow, PhaseView, RankView, SampleRequest, WriteRun


@dataclass(frozen=True)
class DecodeRuns(Sequence[QueryRun]):
    """Runs of one row each. A `QueryRun` is only made when one is asked for; who needs less reads the lists."""

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

    @overload
    def __getitem__(self, index: int) -> QueryRun: ...

    @overload
    def __getitem__(self, index: slice) -> list[QueryRun]: ...

    def __getitem__(self, index: int | slice) -> QueryRun | list[QueryRun]:
        if isinstance(index, slice):
            return [self._run(number) for number in range(*index.indices(len(self)))]
        return self._run(range(len(self))[index])

    def __iter__(self) -> Iterator[QueryRun]:
        return map(self._run, range(len(self)))

    def _run(self, number: int) -> QueryRun:
        first, stop = self.firsts[number], self.stops[number]
        spans = self.pages[number].spans(stop, self.page_size)
        return QueryRun(self.rows[number], 1, tuple(clip_spans(spans, first, stop)) if first else spans)


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
    known = [requests[segment.request_id] for segment in mine]
    starts = [segment.start for segment in mine]
    groups: list[Reach] = []
    for local, window in zip(plan.decode_schedules, windows, strict=True):
        if schedule is None:
            own, blocks = _runs(mine, window, requests, place.shard), (QueryBlock(0, ()),) * len(by_pcp)
            groups.append(Reach(local, len(mine), own, blocks, (), ()))
        else:
            blocks = tuple(QueryBlock(len(block), _runs(block, window, requests, place.shard)) for block in by_pcp)
            groups.append(Reach(schedule, 0, (), blocks, (), ()))
    return RankView(
        token_ids=tuple([segment.token_ids[0] if segment.token_ids else 0 for segment in mine]),
        positions=tuple(starts),
        writes=_writes(starts, known, place.shard),
        phases=(PhaseView(0, len(mine), (), tuple(groups)),),
        samples=tuple(
            [
                SampleRequest(row, segment.request_id, segment.start + 1 - request.num_prompt)
                for row, (segment, request) in enumerate(zip(mine, known, strict=True))
            ]
        ),
        scored=(),
        pending=tuple([PendingRow(row, segment.request_id) for row, segment in enumerate(mine) if segment.pending]),
    )


def _runs(
    segments: Sequence[Segment], window: int | None, requests: Mapping[str, KnownRequest], shard: int
) -> DecodeRuns:
    """What the rows of segments see of this shard. A row that sees nothing has no run."""
    size = requests[segments[0].request_id].table.page_size if segments else 1
    found = DecodeRuns([], [], [], [], size)
    for row, segment in enumerate(segments):
        pages, start = requests[segment.request_id].table.on(shard), segment.start
        stop = pages.visible(start + 1, size)
        first = 0 if window is None else pages.visible(window_start(start, window), size)
        if first < stop:
            found.rows.append(row)
            found.pages.append(pages)
            found.firsts.append(first)
            found.stops.append(stop)
    return found


def _writes(starts: Sequence[int], known: Sequence[KnownRequest], shard: int) -> tuple[WriteRun, ...]:
    writes: list[WriteRun] = []
    for row, (start, request) in enumerate(zip(starts, known, strict=True)):
        table = request.table
        number, offset = divmod(start, table.page_size)
        page = table.pages[number]
        if page.shard == shard:
            writes.append(WriteRun(row, page.index * table.page_size + offset, 1))
    return tuple(writes)
