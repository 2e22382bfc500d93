"""How many drafts prove right, by their position behind the last token of a request.

It owns the counts; it must not know where drafts come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class DraftCounts:
    """Drafts of all requests since the start, by position: entry 0 is for the first draft of a step."""

    # drafts that were computed
    drafted: tuple[int, ...] = ()
    # drafts that were accepted
    accepted: tuple[int, ...] = ()

    @staticmethod
    def of_step(drafted: int, accepted: int) -> DraftCounts:
        """The counts of one step of a request, which computed so many drafts and accepted the first of them."""
        return DraftCounts((1,) * drafted, (1,) * accepted)

    def plus(self, other: DraftCounts) -> DraftCounts:
        """The sums."""
        return DraftCounts(_sums(self.drafted, other.drafted), _sums(self.accepted, other.accepted))

    def since(self, before: DraftCounts) -> DraftCounts:
        """What was counted after `before`."""
        return DraftCounts(_sums(self.drafted, before.drafted, -1), _sums(self.accepted, before.accepted, -1))

    @property
    def steps(self) -> int:
        """Steps of single requests in which something was drafted."""
        return self.drafted[0] if self.drafted else 0

    @property
    def mean_length(self) -> float | None:
        """Mean number of tokens that such a step gives: the accepted drafts, and one more. None without any."""
        return 1 + sum(self.accepted) / self.steps if self.steps else None

    @property
    def rates(self) -> list[float]:
        """Share of the drafts at each position that were accepted."""
        pairs = zip_longest(self.drafted, self.accepted, fillvalue=0)
        return [accepted / drafted for drafted, accepted in pairs if drafted]


def _sums(left: tuple[int, ...], right: tuple[int, ...], sign: int = 1) -> tuple[int, ...]:
    """left + sign · right, the shorter one as if zeros followed."""
    return tuple(a + sign * b for a, b in zip_longest(left, right, fillvalue=0))
