"""Where the rows of a step are whose start only the device knows: see `Segment.slack`.

A segment of L rows that may begin up to s positions later has L + s *places*, one for each position that its rows may
have. Attention is prepared for the places; the device finds out which of them the rows take. It owns these integers,
in plain Python; it must not know how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from longspan.plan.plan import StepPlan
from longspan.plan.view import RankView, segments_in_order

NO_SLOT = -1
"""In place of the slot of a row that is not written."""


@dataclass(frozen=True)
class RowPlaces:
    """The rows [T] and places [P] of a step on a rank, as far as the plan knows them."""

    # token of each row; 0 for one that is in the results of the step before
    token_ids: Sequence[int]
    # position of each row, if it begins as early as it can
    positions: Sequence[int]
    # the request's column in the results of the step before; that of none where the plan knows all
    columns: Sequence[int]
    # for a token of the step before its number there: 0 for the last accepted one, else that of a draft
    numbers: Sequence[int]
    # place of each row, if it begins as early as it can
    places: Sequence[int]
    # for each place the first row of its segment
    first_rows: Sequence[int]
    # slot of each place
    slots: Sequence[int]


def widened(plan: StepPlan, prefill: bool = True) -> StepPlan:
    """The plan with a row for each place; without `prefill` only its decode phase."""
    segments = (segment for segment in plan.segments if prefill or not segment.prefill)
    return replace(plan, segments=tuple(
        structs.replace(segment, pending=segment.pending + segment.slack, slack=0) if segment.slack else segment
        for segment in segments
    ))  # fmt: skip


def row_places(
    plan: StepPlan, view: RankView, wide: RankView, pcp: int, columns: Mapping[str, int], none: int
) -> RowPlaces:
    """The rows and places of a step.

    Args:
        plan: the step.
        view: a rank's share of it.
        wide: the same of the `widened` plan.
        pcp: the rank's pcp index.
        columns: by request, its column in the results of the step before.
        none: the column of no request.
    """
    of_row, numbers = [none] * len(view.token_ids), [0] * len(view.token_ids)
    for row, request_id, draft in view.pending:
        of_row[row], numbers[row] = columns[request_id], draft
    places: list[int] = []
    first_rows: list[int] = []
    for segment in segments_in_order(plan, pcp):
        if len(first_rows) == len(wide.positions):  # the wide plan has no prefills, whose rows stay where they are
            break
        row, place = len(places), len(first_rows)
        places += range(place, place + segment.length)
        first_rows += [row] * (segment.length + segment.slack)
    slots = [NO_SLOT] * len(first_rows)
    for run in wide.writes:
        slots[run.row : run.row + run.length] = range(run.slot, run.slot + run.length)
    return RowPlaces(view.token_ids, view.positions, of_row, numbers, places, first_rows, slots)
