"""Every schedule by name: adding one is one file and one row here."""

from collections.abc import Mapping
from types import MappingProxyType

from longspan.attention.schedules import gather_kv, gather_q, gather_q_rs, local, ring_kv, ring_q, tree_q
from longspan.attention.schedules.base import ContextGroup, Join, Schedule

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "local": local.run,
        "gather_q": gather_q.run,
        "gather_q_rs": gather_q_rs.run,
        "ring_q": ring_q.run,
        "tree_q": tree_q.run,
        "gather_kv": gather_kv.run,
        "ring_kv": ring_kv.run,
    }
)

__all__ = ["SCHEDULES", "ContextGroup", "Join", "Schedule"]
