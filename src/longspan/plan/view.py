"""One rank's share of a step, derived from the plan and the mirrored page tables.

It owns the translation from positions to rows, slots and visible lengths; plain integers, it must
not touch tensors or communicate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan
from longspan.plan.reach import Moves, Place, Reach, reach


@dataclass(frozen=True)
class PhaseView:
    """The rows of one phase (decode or prefill) on this rank: [start, stop).

    `diagonal` are the (row, length) of segments longer than one token, counted from `start`; `groups` has one `Reach`
    for each layer group.
    """

    start: int
    stop: int
    diagonal: tuple[tuple[int, int], ...]
    groups: tuple[Reach, ...]


@dataclass(frozen=True)
class WriteRun:
    """Rows [row, row + length) of this rank's batch go to slots [slot, slot + length)."""

    row: int
    slot: int
    length: int


@dataclass(frozen=True)
class SampleRequest:
    """Row whose logits give token number `position` of a request's output."""

    row: int
    request_id: str
    position: int


@dataclass(frozen=True)
class ScoredRows:
    """Rows [row, row + length) whose logits score the prompt's tokens [position, position + length)."""

    row: int
    length: int
    request_id: str
    position: int


@dataclass(frozen=True)
class RankView:
    """Everything one rank needs for a step.

    `pending` are (row, request) of tokens that this rank sampled in the step before; their `token_ids` say nothing.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    writes: tuple[WriteRun, ...]
    phases: tuple[PhaseView, ...]
    samples: tuple[SampleRequest, ...]
    scored: tuple[ScoredRows, ...]
    pending: tuple[tuple[int, str], ...] = ()


def rank_view(
    plan: StepPlan,
    requests: Mapping[str, KnownRequest],
    place: Place,
    windows: Sequence[int | None],
    moves: Mapping[str, Moves | None],
) -> RankView:
    """One rank's share; `windows` are the model's layer groups, widest first, `moves` what travels by schedule."""
    ordered: list[Segment] = []
    phases: list[PhaseView] = []
    row = 0
    for prefill, schedules in ((False, plan.decode_schedules), (True, plan.prefill_schedules)):
        members = [segment for segment in plan.segments if segment.prefill == prefill]
        if not members:
            continue
        mine = sorted((s for s in members if s.pcp == place.pcp), key=lambda s: s.num_remote_groups)
        groups = [
            reach(schedule, group, window, members, mine, requests, place, moves[schedule])
            for group, (schedule, window) in enumerate(zip(schedules, windows, strict=True))
        ]
        stop = row + sum(segment.length for segment in mine)
        phases.append(PhaseView(row, stop, _diagonal(mine), tuple(groups)))
        ordered += mine
        row = stop
    token_ids: list[int] = []
    positions: list[int] = []
    writes: list[WriteRun] = []
    samples: list[SampleRequest] = []
    scored: list[ScoredRows] = []
    pending: list[tuple[int, str]] = []
    for segment in ordered:
        row = len(token_ids)
        for offset, span in requests[segment.request_id].table.slots(place.shard, segment.start, segment.stop):
            writes.append(WriteRun(row + offset, span.slot, span.length))
        token_ids += segment.token_ids
        if segment.pending:
            pending.append((len(token_ids), segment.request_id))
            token_ids.append(0)
        positions += range(segment.start, segment.stop)
        for before_end in reversed(range(segment.sample)):
            output = segment.stop - before_end - requests[segment.request_id].num_prompt
            samples.append(SampleRequest(len(token_ids) - 1 - before_end, segment.request_id, output))
        last = min(segment.stop, requests[segment.request_id].num_prompt - 1)
        if segment.scores and last > segment.start:
            scored.append(ScoredRows(row, last - segment.start, segment.request_id, segment.start + 1))
    return RankView(
        tuple(token_ids), tuple(positions), tuple(writes), tuple(phases), tuple(samples), tuple(scored), tuple(pending)
    )


def _diagonal(mine: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    row = 0
    for segment in mine:
        if segment.length > 1:
            found.append((row, segment.length))
        row += segment.length
    return tuple(found)
