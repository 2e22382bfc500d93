"""Nothing travels: all pages that a query sees are on the rank that computes it.

The plan chooses this schedule if no segment has remote groups, so there are no travelling rows.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState
from longspan.errors import EngineError


def run(join: Join) -> AttentionState:
    """See `Schedule.run`: there are no rows. Raises `EngineError` if there are."""
    if sum(join.reach.block_rows):
        raise EngineError(f"schedule=local with travelling rows {join.reach.block_rows}: the plan is wrong")
    return AttentionState.empty(0, join.q.shape[1], join.variant.value_dim, join.q)


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: a kernel call for each segment."""
    calls = max(max(load.calls for load in step.totals.by_pcp), 1)
    return LayerTime(fixed=calls * step.model.constants.call_s, compute=step.key_compute, transfer=0.0, copies=0.0)


SCHEDULE = Schedule(
    name="local",
    moves=None,
    run=run,
    bytes=lambda _: 0,
    seconds=seconds,
    recordable=True,
    colour="#7d8998",
    sentence="nothing travels: all keys are at hand",
)
