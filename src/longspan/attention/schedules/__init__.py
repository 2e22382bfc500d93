"""Every schedule by name: adding one is one file and one row here."""

from collections.abc import Mapping
from types import MappingProxyType

from longspan.attention.schedules import gather_kv, gather_q, local
from longspan.attention.schedules.base import ContextGroup, Join, Schedule

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {"local": local.run, "gather_q": gather_q.run, "gather_kv": gather_kv.run}
)

__all__ = ["SCHEDULES", "ContextGroup", "Join", "Schedule"]
