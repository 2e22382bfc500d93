"""What the scheduler counts, as it is reported outside.

It owns the record; it must not know how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.scheduler.acceptance import DraftCounts


@dataclass(frozen=True)
class SchedulerCounters:
    """Queue lengths now, and counts since the start."""

    # requests that wait, those whose KV is being fetched included
    waiting: int = 0
    # requests that prefill or decode
    running: int = 0
    # preemptions since the start
    preemptions: int = 0
    # draft tokens that were computed
    drafted_tokens: int = 0
    # draft tokens that proved right
    accepted_tokens: int = 0
    # both by position
    drafts: DraftCounts = field(default_factory=DraftCounts)
