"""Nothing travels: every query's pages are on the rank that computes it. 0 bytes.

The plan marks such segments, so a step whose schedule is `local` has no travelling rows.
"""

from __future__ import annotations

from longspan.attention.partial import Partial
from longspan.attention.schedules.base import Join
from longspan.errors import EngineError


def run(join: Join) -> Partial:
    """The identity for no rows."""
    if sum(join.reach.block_rows):
        raise EngineError(f"schedule=local with travelling rows {join.reach.block_rows}: the plan is wrong")
    return Partial.empty(0, join.q.shape[1], join.form.value_dim, join.q)
