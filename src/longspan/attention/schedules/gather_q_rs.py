"""Queries travel, and weighted results are summed: all-gather the queries, all-gather the lse, reduce-scatter the out.

A variant of `gather_q`. With the lse of all members, each member computes the final lse of every row and scales its own
out by exp(lse − final lse); the result of a row is then a plain sum. It owns the order of these operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule, unpack
from longspan.attention.state import AttentionState

_NAME = "gather_q_rs"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    group, rows, heads = join.group.collectives, join.rows, join.q.shape[1]
    queries = group.all_gather(join.variant.sent_queries(join.q), rows, _NAME)
    parts = [unpack(packed) for packed in join.attend_received(queries)]
    # the lse of every row of the group, from this member's pages; then from all pages
    mine = torch.cat([part.lse for part in parts])
    lse = torch.stack(group.all_gather(mine, [len(mine)] * len(rows), _NAME)).logsumexp(0)
    totals = torch.split(lse, [len(part.lse) for part in parts])
    sends = [_weighed(part, total) for part, total in zip(parts, totals, strict=True)]
    shape = (len(join.q), heads, join.variant.sent_dim)
    returned = group.all_to_all(sends, [shape] * len(rows), _NAME)
    if not len(join.q):
        return AttentionState.empty(0, heads, join.variant.value_dim, join.q)
    own = totals[group.rank]
    return join.variant.received_state(AttentionState(torch.stack(returned).sum(0), own))


def _weighed(part: AttentionState, total: Tensor) -> Tensor:
    """out [T, H, D] · exp(lse − total), with `total` [T, H] the final lse. A weight of 0 gives 0 even if out is NaN."""
    weight = torch.exp(part.lse - total).nan_to_num_(0.0)[..., None]
    return torch.where(weight > 0, part.out, 0.0) * weight


def sent(step: StepTotals) -> int:
    """See `Schedule.bytes`: as `gather_q`, but without lse in what is returned, and every lse goes to all members."""
    shape, group = step.model.shape, step.model.group
    rows = group.members_per_pcp * sum(step.totals.rows)
    values = shape.state_bytes - shape.lse_bytes
    return (group.members - 1) * rows * (shape.query_bytes + values + group.members * shape.lse_bytes)


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: three collectives, for queries, for the lse of all members, and for weighted results."""
    model, (arriving, returning, handled) = step.model, step.queries
    members, each = model.group.members, model.group.members_per_pcp
    lse = (members - 1) * sum(step.totals.rows) * each * model.shape.lse_bytes
    return LayerTime(
        fixed=step.fixed(_NAME, 3, step.query_calls),
        compute=step.query_compute,
        transfer=model.exchange(arriving) + model.exchange(lse) + model.exchange(returning),
        copies=handled * model.constants.copy_s,
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="queries",
    run=run,
    bytes=sent,
    seconds=seconds,
    colour="#0082a1",
    sentence="the same, and answers are summed on the way back",
)
