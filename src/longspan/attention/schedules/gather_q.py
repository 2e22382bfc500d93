"""Queries travel (pass-Q): all-gather queries, attend own pages, all-to-all the partials, merge.

Bytes do not depend on the length of the context. It owns this choreography and knows the group only
through its collectives.
"""

from __future__ import annotations

from longspan.attention.partial import Partial
from longspan.attention.schedules.base import Join

_LABEL = "gather_q"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    group, rows = join.group.collectives, join.rows
    sends = join.visit(group.all_gather(join.form.outgoing(join.q), rows, _LABEL))
    shape = (len(join.q), join.q.shape[1], join.packed_dim)
    return join.merged(group.all_to_all(sends, [shape] * len(rows), _LABEL))
