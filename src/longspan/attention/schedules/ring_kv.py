"""Keys circulate (ring pass-KV): while a rank attends to the block of one shard, the next shard's block arrives.

This is Ring Attention (Liu et al. 2023) over pages. No states are sent. In each round a block of bounded size from
every shard goes round the ring. It owns the rounds, which follow from the plan alone.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.schedules.ring import circulate
from longspan.attention.state import AttentionState
from longspan.cache.pages import clip_spans

_NAME = "ring_kv"
_BLOCKS = 2  # blocks that a rank holds at once: the one in use and the one that arrives


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    shares, group = join.reach.shares, join.group.collectives
    size = max(1, join.group.workspace_tokens // _BLOCKS)
    parts = [AttentionState.empty(join.q.shape[0], join.q.shape[1], join.variant.value_dim, join.q)]
    for start in range(0, max(share.tokens for share in shares), size):
        stop = start + size
        own = join.kv.take(clip_spans(shares[group.rank].spans, start, stop)).packed()
        tokens = [min(max(share.tokens - start, 0), size) for share in shares]
        shapes = [(*own.shape[:2], count, own.shape[3]) for count in tokens]
        for owner, kv in circulate(group, own, shapes, _NAME):
            runs = join.prepared.in_round(owner, start, stop, len(join.q))
            if runs is not None:
                parts = [join.variant.merge([*parts, join.variant.own(join.q, runs, join.kv.unpacked(kv))])]
    return parts[0]


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: n − 1 transfers in a round for n members, each during the attention to a block."""
    model = step.model
    arriving, handled, rounds = step.keys(model.workspace_tokens // _BLOCKS)
    moving = model.exchange(arriving)
    return LayerTime(
        fixed=rounds * step.fixed(_NAME, model.group.members - 1, step.key_calls),
        compute=step.key_compute,
        transfer=moving,
        copies=handled * model.constants.copy_s,
        hidden=step.hidden(step.key_compute, moving),
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="keys",
    run=run,
    bytes=StepTotals.keys_sent,
    seconds=seconds,
    colour="#b84d49",
    sentence="keys pass round a ring of ranks",
)
