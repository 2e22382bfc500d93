"""Which rows of a step are accepted, and the further runs of a module that drafts from them.

It owns the comparison of drafts with sampled tokens, and the segments of these runs. Plain Python: every rank computes
the same from the same plan and tokens. Where one rank holds all pages, the device compares, with the integers of
`SampledRows`. It must not know how a module is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from longspan.cache.pages import PageTable
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan, window_start
from longspan.plan.reach import Place
from longspan.plan.view import RankView, segments_in_order


@dataclass(frozen=True)
class AcceptedRow:
    """The last row of a request in a step whose token, and all before it, are right."""

    # the pcp index that computed it
    pcp: int
    # its number among the sampled rows of this pcp index
    sample: int
    # its position
    position: int


def sampled_segments(plan: StepPlan, pcp: int) -> list[Segment]:
    """The segments of a pcp index with sampled rows, in the order of its rows."""
    return [segment for segment in segments_in_order(plan, pcp) if segment.sample]


def accepted_rows(plan: StepPlan, sampled: Sequence[Sequence[int]]) -> dict[str, AcceptedRow]:
    """By request, in the order of their first segments, the last accepted row.

    `sampled` are the tokens that each pcp index has sampled, in the order of its rows.
    """
    numbers: dict[tuple[str, int], int] = {}
    for pcp in range(len(sampled)):
        count = 0
        for segment in sampled_segments(plan, pcp):
            numbers[segment.request_id, segment.start] = count
            count += segment.sample
    found: dict[str, AcceptedRow] = {}
    wrong: set[str] = set()
    for segment in sorted((s for s in plan.segments if s.sample), key=lambda s: s.start):
        request, first = segment.request_id, segment.stop - segment.sample
        number = numbers[request, segment.start]
        for offset in range(segment.sample):
            before = found.get(request)
            if before is not None and request not in wrong:
                drafted = segment.token_ids[first + offset - segment.start]
                if sampled[before.pcp][before.sample] != drafted:
                    wrong.add(request)
            if request not in wrong:
                found[request] = AcceptedRow(segment.pcp, number + offset, first + offset)
    order = dict.fromkeys(segment.request_id for segment in plan.segments)
    return {request: found[request] for request in order if request in found}


def draft_run(
    accepted: Mapping[str, AcceptedRow],
    run: int,
    requests: Mapping[str, KnownRequest],
    place: Place,
    windows: Sequence[int | None],
) -> list[Segment]:
    """The rows of run number `run` of a module, counted from 0 for the step's own rows, one of each request.

    A row is computed by the ranks that computed the accepted one, so that no hidden state is sent. A request that has
    no page for the row, or has it on another pcp index, drafts no further token.
    """
    found: list[Segment] = []
    for request, row in accepted.items():
        table, position = requests[request].table, row.position + run
        shards = place.shards_of_pcp[row.pcp]
        if position < len(table.pages) * table.page_size and table.shard_of(position) in shards:
            remote = _remote_groups(table, position, shards, windows, place)
            found.append(Segment(request, position, (0,), row.pcp, False, remote, 0))
    return found


def _remote_groups(
    table: PageTable, position: int, shards: Sequence[int], windows: Sequence[int | None], place: Place
) -> int:
    """See `Segment.num_remote_groups`, for a lone token."""
    everywhere = [shard for members in place.shards_of_pcp for shard in members]
    for count, window in enumerate(windows):
        first = window_start(position, window)
        seen = {shard for shard in everywhere if table.visible(shard, position + 1) > table.visible(shard, first)}
        if all(seen <= {member} for member in shards):
            return count
    return len(windows)


def next_token_ids(view: RankView) -> list[int]:
    """The token after each row, where the plan has it; behind a sampled row and a pending one it has none."""
    known = [*view.token_ids[1:], 0] if view.token_ids else []
    for row, token in view.following:
        known[row] = token
    return known


def drafted_behind(position: int, table: PageTable, tokens: int) -> int:
    """How many of `tokens` drafts are made behind the token at `position`: those that need no page beyond the table."""
    return min(tokens, len(table.pages) * table.page_size - position)


class SampledRows(NamedTuple):
    """The rows of one request that a step samples, on the only rank of a context group: they are adjacent."""

    # the request
    request_id: str
    # the first row
    row: int
    # its number among all sampled rows
    sample: int
    # number of the rows
    rows: int
    # position of the first row, if all drafts of the step before were wrong
    position: int
    # how many positions later it may be
    slack: int
    # index in the request's output of the token that is sampled there
    output: int
    # positions behind that of the first row for which there are pages
    room: int

    def later(self, tokens: int) -> int:
        """How many positions behind `position` the further runs of a module may compute.

        A run computes one, which depends on the accepted row; with `tokens` drafts there are `tokens` - 1 runs.
        """
        return min(self.slack + self.rows + tokens - 2, self.room) if tokens > 1 else 0

    def drafted(self, accepted: int, tokens: int) -> int:
        """How many of `tokens` drafts behind accepted row number `accepted` have been computed: others had no page."""
        return min(tokens, 1 + self.room - self.slack - accepted)


def sampled_rows(plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest]) -> list[SampledRows]:
    """The sampled rows by request, in the order of the rows."""
    found: list[SampledRows] = []
    slack = {segment.request_id: segment.slack for segment in plan.segments}
    number = 0
    for request_id, group in groupby(view.samples, lambda sample: sample.request_id):
        samples, table = tuple(group), requests[request_id].table
        first, position = samples[0], view.positions[samples[0].row]
        room = len(table.pages) * table.page_size - position - 1
        found.append(
            SampledRows(
                request_id, first.row, number, len(samples), position, slack[request_id], first.position, room
            )
        )  # fmt: skip
        number += len(samples)
    return found


def later_plan(sampled: Sequence[SampledRows], tokens: int, groups: int) -> StepPlan:
    """A step of all positions that further runs may compute: a segment for each request with any, in this order."""
    segments = tuple(
        Segment(each.request_id, each.position + 1, (0,) * each.later(tokens), 0, False, 0, 0)
        for each in sampled
        if each.later(tokens)
    )
    return StepPlan(0, (), (), (), (), (), segments, ("local",) * groups, ("local",) * groups)
