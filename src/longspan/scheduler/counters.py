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
    # draft tokens by position
    drafts: DraftCounts = field(default_factory=DraftCounts)

    @property
    def drafted_tokens(self) -> int:
        """Draft tokens that were computed."""
        return sum(self.drafts.drafted)

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that proved right."""
        return sum(self.drafts.accepted)
