"""What an engine has sent between its ranks."""

from __future__ import annotations

from longspan import LLM
from longspan.config import KEY_SCHEDULES, QUERY_SCHEDULES
from longspan.engine.engine import Engine


def schedules_that_moved(engine: LLM | Engine) -> set[str]:
    """The schedules under which some rank has sent bytes to another: which of them really ran."""
    sent = engine.stats().traffic.bytes_by_label
    return {schedule for schedule in (*QUERY_SCHEDULES, *KEY_SCHEDULES) if sent.get(schedule)}
