"""Queries circulate (ring pass-Q): while the queries of one member attend to a rank's pages, the next ones arrive.

At the end the states are returned by all-to-all (Context Parallelism for Scalable Million-Token Inference, 2024,
algorithm 3). It owns the order of these operations.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule, pack
from longspan.attention.schedules.ring import circulate
from longspan.attention.state import AttentionState

_NAME = "ring_q"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    group, rows, heads = join.group.collectives, join.rows, join.q.shape[1]
    pcp_of = {shard: pcp for pcp, shards in enumerate(join.group.shards_of_pcp) for shard in shards}
    sends = join.nothing()
    mine = join.variant.sent_queries(join.q)
    for owner, queries in circulate(group, mine, [(count, *mine.shape[1:]) for count in rows], _NAME):
        if len(queries):
            runs = join.prepared.received[pcp_of[owner]]
            sends[owner] = pack(join.variant.attend_received(queries, runs, join.kv, owner))
    shape = (len(join.q), heads, join.packed_dim)
    return join.merged(group.all_to_all(sends, [shape] * len(rows), _NAME))


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: the queries of a DCP group's members arrive one by one, so each reads a shard again."""
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
