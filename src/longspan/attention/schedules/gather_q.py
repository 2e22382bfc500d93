"""Queries travel (pass-Q): all-gather the queries, attend to own pages, return the states by all-to-all, merge.

The number of bytes does not depend on the length of the context. It owns the order of these operations, and knows other
ranks only through the collectives of the group.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState

_NAME = "gather_q"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`."""
    group, rows = join.group.collectives, join.rows
    sends = join.attend_received(group.all_gather(join.variant.sent_queries(join.q), rows, _NAME))
    shape = (len(join.q), join.q.shape[1], join.packed_dim)
    return join.merged(group.all_to_all(sends, [shape] * len(rows), _NAME))


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: two collectives, one for the queries and one for the states."""
    model, (arriving, returning, handled) = step.model, step.queries
    return LayerTime(
        fixed=step.fixed(_NAME, 2, step.query_calls),
        compute=step.query_compute,
        transfer=model.exchange(arriving) + model.exchange(returning),
        copies=handled * model.constants.copy_s,
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="queries",
    run=run,
    bytes=StepTotals.queries_sent,
    seconds=seconds,
    recordable=True,
    colour="#008888",
    sentence="queries travel to the keys, gathered from all ranks at once",
)
