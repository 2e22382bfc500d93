"""One rank's share of a step, derived from the plan and the mirrored page tables.

It owns the order of a rank's rows and the translation from positions to rows and slots. It computes with plain
integers and must not touch tensors or communicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan
from longspan.plan.reach import Moves, Place, Reach, reach, reads_itself


@dataclass(frozen=True)
class PhaseView:
    """The rows of one phase (decode or prefill) on this rank."""

    # first row
    start: int
    # row after the last
    stop: int
    # (first row, length) of each segment longer than one token that is not a causal run; rows count from `start`
    diagonal: tuple[tuple[int, int], ...]
    # what the rows see off the diagonal in each layer group, widest window first
    groups: tuple[Reach, ...]


class WriteRun(NamedTuple):
    """KV of rows [row, row + length) of this rank is written to slots [slot, slot + length)."""

    # first row
    row: int
    # first slot
    slot: int
    # number of rows
    length: int


class SampleRequest(NamedTuple):
    """A row whose logits are sampled."""

    # the row
    row: int
    # its request
    request_id: str
    # index of the sampled token in the request's output
    position: int
    # how many of the tokens before the sampled one are drafts
    drafts: int = 0


class PendingRow(NamedTuple):
    """A row whose token this rank sampled or drafted in the step before."""

    # the row
    row: int
    # its request
    request_id: str
    # 0 for the token that was sampled last, else the number of the draft behind it, counted from 1
    draft: int = 0


@dataclass(frozen=True)
class ScoredRows:
    """Rows [row, row + length) whose logits score the prompt's tokens [position, position + length)."""

    # first row
    row: int
    # number of rows
    length: int
    # their request
    request_id: str
    # position of the first token that is scored: one after that of the first row
    position: int


@dataclass(frozen=True)
class RankView:
    """Everything one rank needs for a step.

    Decode rows come before prefill rows. In each phase rows of segments with fewer remote groups come first, so that
    the local rows of every layer group are a prefix.
    """

    # token of each row
    token_ids: Sequence[int]
    # position of each row
    positions: Sequence[int]
    # where the rows' KV goes in this rank's pool
    writes: Sequence[WriteRun]
    # phases with segments in this step, on any rank
    phases: tuple[PhaseView, ...]
    # rows that are sampled
    samples: Sequence[SampleRequest]
    # rows that score prompt tokens
    scored: tuple[ScoredRows, ...]
    # rows whose tokens only this rank knows; their entries in `token_ids` are 0 and are replaced on the device
    pending: Sequence[PendingRow] = ()
    # (row, token) of each segment's last row whose next token is in the plan
    following: tuple[tuple[int, int], ...] = ()


def schedule_in_place(schedules: Sequence[str], moves: Mapping[str, Moves | None]) -> str | None:
    """The one of a phase's schedules under which ranks read the pages of all in place: then all layer groups do."""
    return next((schedule for schedule in schedules if moves[schedule] == "signals"), None)


def rows_in_order(segments: Iterable[Segment], pcp: int) -> list[Segment]:
    """Those segments of one phase that a pcp index computes, in the order of its rows."""
    return sorted((s for s in segments if s.pcp == pcp), key=lambda s: s.num_remote_groups)


def segments_in_order(plan: StepPlan, pcp: int) -> list[Segment]:
    """Those segments that a pcp index computes, in the order of its rows."""
    phases = ([s for s in plan.segments if s.prefill == prefill] for prefill in (False, True))
    return [segment for members in phases for segment in rows_in_order(members, pcp)]


def _first_starts(plan: StepPlan) -> dict[str, int]:
    """For each request that decodes, the position of its first token in the step; those behind it are drafts."""
    found: dict[str, int] = {}
    for segment in plan.segments:
        if not segment.prefill:
            found.setdefault(segment.request_id, segment.start)
    return found


def rank_view(
    plan: StepPlan,
    requests: Mapping[str, KnownRequest],
    place: Place,
    windows: Sequence[int | None],
    moves: Mapping[str, Moves | None],
    causal_runs: bool = False,
    through_shards: bool = False,
) -> RankView:
    """One rank's share of a step.

    Args:
        plan: the step.
        requests: requests by id, with the plan already applied.
        place: the position of the rank.
        windows: the width of window of each layer group, widest first.
        moves: what travels under each schedule, by its name.
        causal_runs: whether segments read their own tokens from the cache where all of these are on this shard.
        through_shards: whether they do so on whichever shards these are, as all queries travel: see `all_travel`.
    """
    common = requests, place, moves, causal_runs, through_shards
    ordered: list[Segment] = []
    phases: list[PhaseView] = []
    row = 0
    for prefill, schedules in ((False, plan.decode_schedules), (True, plan.prefill_schedules)):
        if not (members := [segment for segment in plan.segments if segment.prefill == prefill]):
            continue
        mine = rows_in_order(members, place.pcp)
        in_place = schedule_in_place(schedules, moves)
        groups = [
            reach(in_place or schedule, group, window, members, mine, *common)
            for group, (schedule, window) in enumerate(zip(schedules, windows, strict=True))
        ]
        stop = row + sum(segment.length for segment in mine)
        anywhere = through_shards or in_place is not None  # own tokens are read wherever they are
        itself = [anywhere or reads_itself(s, requests[s.request_id].table, place.shard) for s in mine]
        phases.append(PhaseView(row, stop, _diagonal(mine, itself if causal_runs else ()), tuple(groups)))
        ordered += mine
        row = stop
    token_ids: list[int] = []
    positions: list[int] = []
    writes: list[WriteRun] = []
    samples: list[SampleRequest] = []
    scored: list[ScoredRows] = []
    pending: list[PendingRow] = []
    starts = _first_starts(plan)
    for segment in ordered:
        row = len(token_ids)
        for offset, span in requests[segment.request_id].table.slots(place.shard, segment.start, segment.stop):
            writes.append(WriteRun(row + offset, span.slot, span.length))
        token_ids += (*segment.token_ids, *(0,) * segment.pending)  # placeholders
        pending += _pending(segment, row + len(segment.token_ids))
        positions += range(segment.start, segment.stop)
        prompt = requests[segment.request_id].num_prompt
        samples += _samples(segment, row, prompt, 0 if segment.prefill else starts[segment.request_id])
        scored += _scored(segment, row, prompt)
    return RankView(
        tuple(token_ids), tuple(positions), tuple(writes), tuple(phases), tuple(samples), tuple(scored), tuple(pending),
        _following(ordered),
    )  # fmt: skip


def _samples(segment: Segment, row: int, num_prompt: int, first: int) -> Iterator[SampleRequest]:
    """The sampled rows of a segment that begins at `row`. Tokens behind position `first` are drafts if it decodes."""
    for position in range(segment.stop - segment.sample, segment.stop):
        drafts = 0 if segment.prefill else position - first
        yield SampleRequest(row + position - segment.start, segment.request_id, position + 1 - num_prompt, drafts)


def _pending(segment: Segment, row: int) -> list[PendingRow]:
    """The rows of a segment whose tokens are not in the plan, from `row` on."""
    return [PendingRow(row + draft, segment.request_id, draft) for draft in range(segment.pending)]


def _scored(segment: Segment, row: int, num_prompt: int) -> Iterator[ScoredRows]:
    """The rows of a segment, which begins at `row`, that score prompt tokens: a row scores the token after its own."""
    last = min(segment.stop, num_prompt - 1)
    if segment.scores and last > segment.start:
        yield ScoredRows(row, last - segment.start, segment.request_id, segment.start + 1)


def _following(ordered: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """See `RankView.following`, of segments in the order of their rows."""
    stops = accumulate(segment.length for segment in ordered)
    pairs = zip(stops, (segment.next_token for segment in ordered), strict=True)
    return tuple((stop - 1, token) for stop, token in pairs if token is not None)


def _diagonal(mine: Sequence[Segment], itself: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """(first row, length) of each segment with a diagonal: not a lone token, nor one that reads `itself`.

    If `itself` is empty, no segment reads its own tokens from the cache.
    """
    found: list[tuple[int, int]] = []
    row = 0
    for segment, whole in zip(mine, itself or (False,) * len(mine), strict=True):
        if segment.length > 1 and not whole:
            found.append((row, segment.length))
        row += segment.length
    return tuple(found)
