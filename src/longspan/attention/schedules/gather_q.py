"""Queries travel (pass-Q): all-gather queries, attend own pages, all-to-all the partials, merge.

Bytes do not depend on the length of the context. It owns this choreography and knows the group only
through its collectives.
"""

from __future__ import annotations

import torch

from longspan.attention.partial import Partial, merge
from longspan.attention.schedules.base import Join

_LABEL = "gather_q"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    reach, form, group, heads = join.reach, join.form, join.group, join.q.shape[1]
    rows_of_shard = {
        shard: rows for shards, rows in zip(group.shards_of_pcp, reach.block_rows, strict=True) for shard in shards
    }
    rows = [rows_of_shard[shard] for shard in sorted(rows_of_shard)]
    queries = group.collectives.all_gather(form.outgoing(join.q), rows, _LABEL)
    width = form.travelling_dim + 1
    nothing = join.q.new_empty(0, heads, width, dtype=torch.promote_types(join.q.dtype, torch.float32))
    sends: list[torch.Tensor] = [nothing] * len(rows)
    for shards, block in zip(group.shards_of_pcp, reach.blocks, strict=True):
        # the members of a TP group hold the same tokens and different heads: attend them together
        if not block.rows:
            continue
        held = [queries[shard] for shard in shards]
        together = held[0] if len(held) == 1 else torch.cat(held, dim=1)
        part = form.visiting(together, block.runs, join.kv)
        packed = torch.cat([part.out, part.lse[..., None]], dim=-1)
        for shard, piece in zip(shards, torch.split(packed, heads, dim=1), strict=True):
            sends[shard] = piece
    mine = rows[group.collectives.rank]
    returned = group.collectives.all_to_all(sends, [(mine, heads, width)] * len(rows), _LABEL)
    if not mine:
        return Partial.empty(0, heads, form.value_dim, join.q)
    return form.incoming(merge([Partial(packed[..., :-1], packed[..., -1]) for packed in returned]))
