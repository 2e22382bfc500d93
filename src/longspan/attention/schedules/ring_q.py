"""Queries circulate (ring pass-Q): while one member's are attended, the next ones arrive; partials go home at the end.

Context Parallelism for Scalable Million-Token Inference (2024, algorithm 3). It owns this choreography.
"""

from __future__ import annotations

from longspan.attention.partial import Partial
from longspan.attention.schedules.base import Join, pack
from longspan.attention.schedules.ring import circulate

_LABEL = "ring_q"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    group, rows, heads = join.group.collectives, join.rows, join.q.shape[1]
    pcp_of = {shard: pcp for pcp, shards in enumerate(join.group.shards_of_pcp) for shard in shards}
    sends = join.nothing()
    mine = join.form.outgoing(join.q)
    for owner, queries in circulate(group, mine, [(count, *mine.shape[1:]) for count in rows], _LABEL):
        block = join.reach.blocks[pcp_of[owner]]
        if block.rows:
            sends[owner] = pack(join.form.visiting_member(queries, block.runs, join.kv, owner))
    shape = (len(join.q), heads, join.packed_dim)
    return join.merged(group.all_to_all(sends, [shape] * len(rows), _LABEL))
