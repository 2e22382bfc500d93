"""Nothing but signals travels: every rank reads the pages of all ranks where they lie, because they share memory.

On GPUs this is called peer-mapped or symmetric memory. A rank that has written its keys tells the others, and waits
until they have told it, if its rows see keys of this step. Keys of earlier steps are there: no rank starts a step
before the others have ended the one before it. So a decode token is computed as on one rank, and nobody waits. It owns
the order of writing and reading within a step.
"""

from __future__ import annotations

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule
from longspan.attention.state import AttentionState

_NAME = "mapped_kv"


def run(join: Join) -> AttentionState:
    """See `Schedule.run`. Only rows travel that see keys of this step: see `Reach`."""
    join.group.collectives.await_writes([member for member, rows in enumerate(join.rows) if rows], _NAME)
    own = join.prepared.own
    if own is None or not len(join.q):
        return AttentionState.empty(join.q.shape[0], join.q.shape[1], join.variant.value_dim, join.q)
    return join.variant.own(join.q, own, join.kv, join.dtype)


def sent(step: StepTotals) -> int:
    """See `Schedule.bytes`: a byte from each member that has rows to each other one, if rows see keys of this step."""
    members = len(step.members_with_rows)
    return members * (members - 1)


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: one small message, and no call for other ranks' keys beside that for own ones."""
    return LayerTime(fixed=step.fixed(_NAME, 1, step.key_calls), compute=step.key_compute, transfer=0.0, copies=0.0)


SCHEDULE = Schedule(
    name=_NAME,
    moves="signals",
    run=run,
    bytes=sent,
    seconds=seconds,
    recordable=True,
    colour="#8a5a83",
    sentence="nothing travels: ranks share memory, and read all keys where they lie",
)
