"""Nothing travels: every query's pages are on the rank that computes it. 0 bytes.

The plan marks such segments, so a step whose schedule is `local` has no travelling rows.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState
from longspan.errors import EngineError


def run(join: Join) -> AttentionState:
    """The identity for no rows."""
    if sum(join.reach.block_rows):
        raise EngineError(f"schedule=local with travelling rows {join.reach.block_rows}: the plan is wrong")
    return AttentionState.empty(0, join.q.shape[1], join.variant.value_dim, join.q)


def seconds(step: StepTotals) -> LayerTime:
    """A kernel call for each segment."""
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
