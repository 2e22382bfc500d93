"""One rank's share of a step, derived from the plan and the mirrored page tables.

It owns the translation from positions to rows, slots and visible lengths; plain integers, it must
not touch tensors or communicate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from longspan.cache.pages import PageTable, Span
from longspan.plan import Segment, StepPlan


class KnownRequest(Protocol):
    """What a rank must remember of a request to find its rows' places."""

    table: PageTable
    num_prompt: int


@dataclass(frozen=True)
class QueryRun:
    """Query rows [row, row + length) of one segment and the slots they attend to without a mask."""

    row: int
    length: int
    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """Tokens it sees."""
        return sum(span.length for span in self.spans)


@dataclass(frozen=True)
class Block:
    """The travelling query rows of one pcp index, and what each of its segments sees on this shard."""

    rows: int
    runs: tuple[QueryRun, ...]


@dataclass(frozen=True)
class KeyShare:
    """What one shard contributes when keys travel: its needed tokens as spans of its slots."""

    spans: tuple[Span, ...]
    tokens: int


@dataclass(frozen=True)
class KeyRun:
    """Query rows of one travelling segment here and, for each shard, which tokens of its `KeyShare` they see."""

    row: int
    length: int
    seen: tuple[Span, ...]


@dataclass(frozen=True)
class ClassView:
    """The rows of one class (decode or prefill) on this rank: [start, stop), those from `travel` on travelling.

    `own` are the segments whose pages all lie here, `diagonal` the (row, length) of segments longer than
    one token; rows count from `start`. `blocks` (queries travel) and `shares`, `key_runs` (keys travel) describe the
    travelling segments, whose rows count from `travel`.
    """

    schedule: str
    start: int
    travel: int
    stop: int
    own: tuple[QueryRun, ...]
    diagonal: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]
    shares: tuple[KeyShare, ...]
    key_runs: tuple[KeyRun, ...]

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Travelling rows of every pcp index: the same on all ranks."""
        return tuple(block.rows for block in self.blocks)


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
    request_id: int
    position: int


@dataclass(frozen=True)
class RankView:
    """Everything one rank needs for a step."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    writes: tuple[WriteRun, ...]
    classes: tuple[ClassView, ...]
    samples: tuple[SampleRequest, ...]


def rank_view(
    plan: StepPlan,
    requests: Mapping[int, KnownRequest],
    pcp: int,
    shard: int,
    shards_of_pcp: Sequence[Sequence[int]],
) -> RankView:
    """The share of the rank that stores `shard` and computes the tokens of `pcp`."""
    ordered: list[Segment] = []
    classes: list[ClassView] = []
    row = 0
    for prefill, schedule in ((False, plan.decode_schedule), (True, plan.prefill_schedule)):
        members = [segment for segment in plan.segments if segment.prefill == prefill]
        if not members:
            continue
        mine = sorted((s for s in members if s.pcp == pcp), key=lambda s: s.travels)
        classes.append(_class_view(schedule, members, mine, row, requests, shard, shards_of_pcp))
        ordered += mine
        row += sum(segment.length for segment in mine)
    token_ids: list[int] = []
    positions: list[int] = []
    writes: list[WriteRun] = []
    samples: list[SampleRequest] = []
    for segment in ordered:
        row = len(token_ids)
        for offset, span in requests[segment.request_id].table.slots(shard, segment.start, segment.stop):
            writes.append(WriteRun(row + offset, span.slot, span.length))
        token_ids += segment.token_ids
        positions += range(segment.start, segment.stop)
        if segment.sample:
            output = segment.stop - requests[segment.request_id].num_prompt
            samples.append(SampleRequest(len(token_ids) - 1, segment.request_id, output))
    return RankView(tuple(token_ids), tuple(positions), tuple(writes), tuple(classes), tuple(samples))


def _class_view(
    schedule: str,
    members: Sequence[Segment],
    mine: Sequence[Segment],
    start: int,
    requests: Mapping[int, KnownRequest],
    shard: int,
    shards_of_pcp: Sequence[Sequence[int]],
) -> ClassView:
    local = [segment for segment in mine if not segment.travels]
    moving = [segment for segment in members if segment.travels]
    travel = start + sum(segment.length for segment in local)
    diagonal: list[tuple[int, int]] = []
    row = 0
    for segment in mine:
        if segment.length > 1:
            diagonal.append((row, segment.length))
        row += segment.length
    by_pcp = [[s for s in moving if s.pcp == pcp] for pcp in range(len(shards_of_pcp))]
    keys_travel = schedule == "gather_kv"
    shares, key_runs = _keys(moving, mine, requests, shards_of_pcp) if keys_travel else ((), ())
    return ClassView(
        schedule=schedule,
        start=start,
        travel=travel,
        stop=start + row,
        own=_runs(local, requests, shard),
        diagonal=tuple(diagonal),
        blocks=tuple(Block(sum(s.length for s in block), _runs(block, requests, shard)) for block in by_pcp),
        shares=shares,
        key_runs=key_runs,
    )


def _runs(segments: Sequence[Segment], requests: Mapping[int, KnownRequest], shard: int) -> tuple[QueryRun, ...]:
    runs: list[QueryRun] = []
    row = 0
    for segment in segments:
        spans = requests[segment.request_id].table.spans(shard, segment.unmasked_until)
        if spans:
            runs.append(QueryRun(row, segment.length, spans))
        row += segment.length
    return tuple(runs)


def _keys(
    moving: Sequence[Segment],
    mine: Sequence[Segment],
    requests: Mapping[int, KnownRequest],
    shards_of_pcp: Sequence[Sequence[int]],
) -> tuple[tuple[KeyShare, ...], tuple[KeyRun, ...]]:
    """For keys that travel: each shard's share, requests one behind the other, and where segments look in it."""
    until: dict[int, int] = {}
    for segment in moving:
        until[segment.request_id] = max(segment.unmasked_until, until.get(segment.request_id, 0))
    offsets: list[dict[int, int]] = []
    shares: list[KeyShare] = []
    for shard in sorted(shard for shards in shards_of_pcp for shard in shards):
        spans: list[Span] = []
        offset: dict[int, int] = {}
        tokens = 0
        for request_id, end in until.items():
            offset[request_id] = tokens
            found = requests[request_id].table.spans(shard, end)
            spans += found
            tokens += sum(span.length for span in found)
        offsets.append(offset)
        shares.append(KeyShare(tuple(spans), tokens))
    runs: list[KeyRun] = []
    row = 0
    for segment in (s for s in mine if s.travels):
        table = requests[segment.request_id].table
        seen = tuple(
            Span(offset[segment.request_id], table.visible(shard, segment.unmasked_until))
            for shard, offset in enumerate(offsets)
        )
        runs.append(KeyRun(row, segment.length, seen))
        row += segment.length
    return tuple(shares), tuple(runs)
