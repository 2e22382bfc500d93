"""What an engine has sent between its ranks."""

from __future__ import annotations

from longspan import LLM
from longspan.attention.schedules import SCHEDULES
from longspan.engine.engine import Engine

QUERY_SCHEDULES = [name for name, schedule in SCHEDULES.items() if schedule.moves == "queries"]
KEY_SCHEDULES = [name for name, schedule in SCHEDULES.items() if schedule.moves == "keys"]
IN_PLACE = [name for name, schedule in SCHEDULES.items() if schedule.moves == "signals"]
TRAVELLING = [*QUERY_SCHEDULES, *KEY_SCHEDULES]


def schedules_that_moved(engine: LLM | Engine) -> set[str]:
    """The schedules under which some rank has sent bytes to another: which of them really ran."""
    sent = engine.stats().traffic.bytes_by_label
    return {schedule for schedule in (*TRAVELLING, *IN_PLACE) if sent.get(schedule)}
