"""What comes of one step: the ranks' answer to its plan.

It owns this record and how the ranks' parts make one; it must not know what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.request import PromptScore, SampledToken


@dataclass(frozen=True)
class StepResult:
    """Of one rank, or of all of them."""

    # one for each row that was sampled
    tokens: tuple[SampledToken, ...] = ()
    # of prompt tokens, where they are asked for
    prompt_scores: tuple[PromptScore, ...] = ()
    # by request, why it cannot go on: it has no token
    errors: dict[str, str] = field(default_factory=dict)
    # numbers in the plan's `loads` of those that found no intact page
    failed_loads: tuple[int, ...] = ()
    # numbers in the plan's `saves` of those that the disk did not take
    failed_saves: tuple[int, ...] = ()

    @staticmethod
    def joined(parts: Sequence[StepResult]) -> StepResult:
        """One result of what every rank handed over."""
        return StepResult(
            tuple(token for part in parts for token in part.tokens),
            tuple(score for part in parts for score in part.prompt_scores),
            {request_id: error for part in parts for request_id, error in part.errors.items()},
            tuple(number for part in parts for number in part.failed_loads),
            tuple(number for part in parts for number in part.failed_saves),
        )
