"""Which rows of a step are accepted, and the further runs of a module that drafts from them.

It owns the comparison of drafts with sampled tokens on a rank, and the segments of these runs. Plain Python: every rank
computes the same from the same plan and tokens. It must not know how a module is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.cache.pages import PageTable
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan, window_start
from longspan.plan.reach import Place
from longspan.plan.view import rows_in_order


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
    phases = ([s for s in plan.segments if s.prefill == prefill] for prefill in (False, True))
    return [segment for members in phases for segment in rows_in_order(members, pcp) if segment.sample]


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
