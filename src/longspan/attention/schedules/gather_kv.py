"""Keys travel (pass-KV): ranks with travelling rows gather the needed tokens, and attend to them.

They are sent in rounds that fit into a bounded workspace, and only to ranks that have rows: a rank without rows waits
for nobody. No states are sent. It owns the rounds. They follow from the plan alone, so every rank joins the same number
of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState
from longspan.cache.pages import clip_spans

_NAME = "gather_kv"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    shares, collectives = join.reach.shares, join.group.collectives
    span = max(1, join.group.workspace_tokens // len(shares))  # tokens of each shard in a round
    longest = max(share.tokens for share in shares)
    found: AttentionState | None = None
    for start in range(0, longest, span):
        own = join.kv.take(clip_spans(shares[collectives.rank].spans, start, start + span)).packed()
        tokens = [min(max(share.tokens - start, 0), span) for share in shares]
        parts = [] if found is None else [found]
        for shard, kv in enumerate(_gather(join, own, tokens)):
            runs = join.prepared.in_round(shard, start, start + span, len(join.q))
            if runs is not None:
                parts.append(join.variant.own(join.q, runs, join.kv.unpacked(kv)))
        found = join.variant.merge(parts) if parts else None
    return found or AttentionState.empty(join.q.shape[0], join.q.shape[1], join.variant.value_dim, join.q)


def _gather(join: Join, own: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    """The rows of every shard, `tokens[i]` of shard i, of which this rank has `own`; nothing on a rank without rows."""
    collectives, rows = join.group.collectives, join.rows
    if all(rows):
        return collectives.all_gather(own, tokens, _NAME, dim=2)
    sends = [own if count else own[:, :, :0] for count in rows]
    wanted = tokens if rows[collectives.rank] else [0] * len(tokens)
    return collectives.all_to_all(sends, [(*own.shape[:2], count, own.shape[3]) for count in wanted], _NAME)


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: one collective in each round."""
    model, needed = step.model, step.totals.needed
    _, handled, rounds = step.keys(model.workspace_tokens // model.group.members)
    arriving = max(sum(needed) - needed[member] for member in step.members_with_rows) * model.shape.kv_bytes
    return LayerTime(
        fixed=rounds * step.fixed(_NAME, 1, step.key_calls),
        compute=step.key_compute,
        transfer=model.exchange(arriving),
        copies=handled * model.constants.copy_s,
    )


def sent(step: StepTotals) -> int:
    """See `Schedule.bytes`: keys and values of each needed token, to all other members that have rows."""
    needed = step.totals.needed
    return sum(sum(needed) - needed[member] for member in step.members_with_rows) * step.model.shape.kv_bytes


SCHEDULE = Schedule(
    name=_NAME,
    moves="keys",
    run=run,
    bytes=sent,
    seconds=seconds,
    colour="#ae5c00",
    sentence="keys travel to the queries, gathered",
)
