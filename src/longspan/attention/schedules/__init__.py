"""The table of built-in schedules. To add one, add a file and a row to `_BUILT_IN`."""

from collections.abc import Mapping
from types import MappingProxyType

from longspan.attention.schedules import gather_kv, gather_q, gather_q_rs, local, mapped_kv, ring_kv, ring_q, tree_q
from longspan.attention.schedules.base import ContextGroup, Join, Schedule

_BUILT_IN = (
    local.SCHEDULE,
    gather_q.SCHEDULE,
    gather_q_rs.SCHEDULE,
    ring_q.SCHEDULE,
    tree_q.SCHEDULE,
    gather_kv.SCHEDULE,
    ring_kv.SCHEDULE,
    mapped_kv.SCHEDULE,
)
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({schedule.name: schedule for schedule in _BUILT_IN})
SCHEDULE_NAMES = ("auto", *SCHEDULES)
"""The values of the option: `auto` lets the engine choose."""

__all__ = ["SCHEDULES", "SCHEDULE_NAMES", "ContextGroup", "Join", "Schedule"]
