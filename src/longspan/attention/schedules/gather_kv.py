"""Keys travel (pass-KV): all-gather the needed tokens, in rounds that fit into a bounded workspace, and attend to them.

No states are sent. It owns the rounds. They follow from the plan alone, so every rank joins the same number of them.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState
from longspan.cache.pages import clip_spans

_NAME = "gather_kv"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    shares = join.reach.shares
    group = join.group
    span = max(1, group.workspace_tokens // len(shares))  # tokens of each shard in a round
    longest = max(share.tokens for share in shares)
    parts = [AttentionState.empty(join.q.shape[0], join.q.shape[1], join.variant.value_dim, join.q)]
    for start in range(0, longest, span):
        stop = start + span
        own = join.kv.take(clip_spans(shares[group.collectives.rank].spans, start, stop)).packed()
        tokens = [min(max(share.tokens - start, 0), span) for share in shares]
        gathered = group.collectives.all_gather(own, tokens, _NAME, dim=2)
        for shard, kv in enumerate(gathered):
            runs = join.prepared.in_round(shard, start, stop, len(join.q))
            if runs is not None:
                parts.append(join.variant.own(join.q, runs, join.kv.unpacked(kv)))
        parts = [join.variant.merge(parts)]
    return parts[0]


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: one collective in each round."""
    model = step.model
    arriving, handled, rounds = step.keys(model.workspace_tokens // model.group.members)
    return LayerTime(
        fixed=rounds * step.fixed(_NAME, 1, step.key_calls),
        compute=step.key_compute,
        transfer=model.exchange(arriving),
        copies=handled * model.constants.copy_s,
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="keys",
    run=run,
    bytes=StepTotals.keys_sent,
    seconds=seconds,
    colour="#ae5c00",
    sentence="keys travel to the queries, gathered",
)
