"""Queries travel, and partials are summed on their way back: all-gather lse, rescale, reduce-scatter.

The variant of `gather_q` for groups whose reduce-scatter is fast: every member learns every row's lse, weighs its
own partials with it, and what is left is a sum. It owns this choreography.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.partial import Partial
from longspan.attention.schedules.base import Join, unpack

_LABEL = "gather_q_rs"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    group, rows, heads = join.group.collectives, join.rows, join.q.shape[1]
    parts = [unpack(packed) for packed in join.visit(group.all_gather(join.form.outgoing(join.q), rows, _LABEL))]
    mine = torch.cat([part.lse for part in parts])
    lse = torch.stack(group.all_gather(mine, [len(mine)] * len(rows), _LABEL)).logsumexp(0)
    totals = torch.split(lse, [len(part.lse) for part in parts])
    sends = [_weighed(part, total) for part, total in zip(parts, totals, strict=True)]
    shape = (len(join.q), heads, join.form.travelling_dim)
    returned = group.all_to_all(sends, [shape] * len(rows), _LABEL)
    if not len(join.q):
        return Partial.empty(0, heads, join.form.value_dim, join.q)
    own = totals[group.rank]
    return join.form.incoming(Partial(torch.stack(returned).sum(0), own))


def _weighed(part: Partial, total: Tensor) -> Tensor:
    """out · exp(lse − total); what saw nothing is skipped, not multiplied."""
    weight = torch.exp(part.lse - total).nan_to_num_(0.0)[..., None]
    return torch.where(weight > 0, part.out, 0.0) * weight
