"""Which running request gives up its pages: the choice looks at users' requests, which may run many completions.

It owns this choice; it must not release pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from longspan.scheduler.sequence import SequenceState


class Preemption:
    """The choice at one moment. The oldest request is not chosen unless it runs alone, so the engine always gets on."""

    def __init__(self, running: Iterable[SequenceState], rank: Callable[[SequenceState], int]) -> None:
        self._rank = rank  # lower ones are more important
        self._running = Counter(sequence.parent_id for sequence in running)  # by user's request

    def runs(self, parent_id: str) -> bool:
        """Whether a completion of a user's request is running."""
        return self._running[parent_id] > 0

    def victim(self, candidates: Sequence[SequenceState]) -> SequenceState:
        """Of the last rank, the youngest among those with the most siblings. `candidates` are in the running order."""
        last = self._rank(candidates[-1])
        return max(
            (sequence for sequence in reversed(candidates) if self._rank(sequence) == last),
            key=lambda sequence: self._running[sequence.parent_id],
        )

    def newcomer(self, waiting: Iterable[SequenceState]) -> SequenceState | None:
        """The first waiting request of which nothing runs."""
        return next((sequence for sequence in waiting if not self.runs(sequence.parent_id)), None)

    def victim_for(self, newcomer: SequenceState, running: Sequence[SequenceState]) -> SequenceState | None:
        """A completion to preempt for a newcomer: one whose siblings go on, and that is not more important."""
        least = self._rank(newcomer)
        candidates = [each for each in running if self._running[each.parent_id] > 1 and self._rank(each) >= least]
        return self.victim(candidates) if candidates else None
