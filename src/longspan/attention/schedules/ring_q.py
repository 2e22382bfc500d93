"""Queries circulate (ring pass-Q): while one member's are attended, the next ones arrive; states go home at the end.

Context Parallelism for Scalable Million-Token Inference (2024, algorithm 3). It owns this choreography.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule, pack
from longspan.attention.schedules.ring import circulate
from longspan.attention.state import AttentionState

_NAME = "ring_q"


def run(join: Join) -> AttentionState:
    """Attention states [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    group, rows, heads = join.group.collectives, join.rows, join.q.shape[1]
    pcp_of = {shard: pcp for pcp, shards in enumerate(join.group.shards_of_pcp) for shard in shards}
    sends = join.nothing()
    mine = join.variant.outgoing(join.q)
    for owner, queries in circulate(group, mine, [(count, *mine.shape[1:]) for count in rows], _NAME):
        if len(queries):
            runs = join.prepared.visiting[pcp_of[owner]]
            sends[owner] = pack(join.variant.visiting(queries, runs, join.kv, owner))
    shape = (len(join.q), heads, join.packed_dim)
    return join.merged(group.all_to_all(sends, [shape] * len(rows), _NAME))


def seconds(step: StepTotals) -> LayerTime:
    """Members of a DCP group come one by one, so a shard is read once for each."""
    model, (arriving, returning, handled) = step.model, step.queries
    again = model.group.members_per_pcp - 1
    reads = max(load.reads for load in step.totals.by_shard)
    compute = step.query_compute + reads * again * model.shape.kv_bytes * model.constants.read_s
    circulating = model.exchange(arriving)
    return LayerTime(
        fixed=step.fixed(_NAME, model.group.members, (again + 1) * step.query_calls),
        compute=compute,
        transfer=circulating + model.exchange(returning),
        copies=handled * model.constants.copy_s,
        hidden=step.hidden(compute, circulating),
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="queries",
    run=run,
    bytes=StepTotals.queries_sent,
    seconds=seconds,
    colour="#4576b4",
    sentence="queries pass round a ring of ranks",
)
