"""The waiting requests, in the order in which they start.

It owns this order; it must not know about budgets, pages or steps.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import chain

from longspan.scheduler.sequence import SequenceState


class WaitingQueue:
    """By rank, then first come, first served, with the completions of one user's request in turn.

    One of a request's completions is in line. When it leaves, the next one joins the end of the line, behind the
    requests that have come meanwhile. So each request gets a turn, however many completions another one has.
    """

    def __init__(self, rank: Callable[[SequenceState], int]) -> None:
        self._rank = rank  # lower ones come first
        self._line: deque[SequenceState] = deque()
        self._num_in_line: Counter[str] = Counter()  # by the user's request
        self._behind: dict[str, deque[SequenceState]] = {}  # by the user's request, its completions not in line yet

    def __len__(self) -> int:
        return len(self._line) + sum(map(len, self._behind.values()))

    def __iter__(self) -> Iterator[SequenceState]:
        """All of them, those in line first."""
        return chain(self._line, *self._behind.values())

    def add(self, sequence: SequenceState) -> None:
        """Put a request into the queue, behind those of its rank."""
        if self._num_in_line[sequence.parent_id]:
            self._behind.setdefault(sequence.parent_id, deque()).append(sequence)
        else:
            self._join(sequence)

    def put_back(self, sequence: SequenceState, siblings_run: bool) -> None:
        """Return a preempted request: before those of its rank, or to the next turn of a request that goes on."""
        if not siblings_run:
            insort_left(self._line, sequence, key=self._rank)
            self._num_in_line[sequence.parent_id] += 1
        elif self._num_in_line[sequence.parent_id]:
            self._behind.setdefault(sequence.parent_id, deque()).appendleft(sequence)
        else:
            self._join(sequence)

    def pop(self) -> SequenceState:
        """Take the first one out of the line. The next one of its request joins the end."""
        sequence = self._line.popleft()
        self._left(sequence)
        return sequence

    def extendleft(self, passed: list[SequenceState]) -> None:
        """Return what was popped and not started, in the order in which it was popped."""
        self._line.extendleft(reversed(passed))
        self._num_in_line.update(sequence.parent_id for sequence in passed)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a request from the queue."""
        behind = self._behind.get(sequence.parent_id, ())
        if sequence in behind:
            self._take_behind(sequence)
        else:
            self._line.remove(sequence)
            self._left(sequence)

    def advance(self, sequence: SequenceState) -> None:
        """Move a request in line before those of its rank."""
        self._line.remove(sequence)
        insort_left(self._line, sequence, key=self._rank)

    def _join(self, sequence: SequenceState) -> None:
        insort_right(self._line, sequence, key=self._rank)
        self._num_in_line[sequence.parent_id] += 1

    def _left(self, sequence: SequenceState) -> None:
        """Account for one that left the line."""
        parent = sequence.parent_id
        self._num_in_line[parent] -= 1
        if self._num_in_line[parent]:
            return
        del self._num_in_line[parent]
        if parent in self._behind:
            following = self._behind[parent][0]
            self._take_behind(following)
            self._join(following)

    def _take_behind(self, sequence: SequenceState) -> None:
        behind = self._behind[sequence.parent_id]
        behind.remove(sequence)
        if not behind:
            del self._behind[sequence.parent_id]
