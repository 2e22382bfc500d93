"""The result of one step, which ranks return for a plan.

It owns the record, and joins the results of several ranks; it must not know what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.request import PromptScore, SampledToken


@dataclass(frozen=True)
class DraftTokens:
    """Tokens that ranks expect after a sampled one."""

    # the request
    request_id: str
    # index of the sampled token in the request's output
    position: int
    # the draft tokens that follow it
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class StepResult:
    """The result of a step on one rank, or on all of them."""

    # one for each sampled row
    tokens: tuple[SampledToken, ...] = ()
    # log-probabilities of prompt tokens, for the requests that ask for them
    prompt_scores: tuple[PromptScore, ...] = ()
    # by request id, why the request cannot be continued; it has no token in `tokens`
    errors: dict[str, str] = field(default_factory=dict)
    # indices into the plan's `loads` of pages that were missing or damaged
    failed_loads: tuple[int, ...] = ()
    # numbers in the plan's `saves` of those that the disk did not take
    failed_saves: tuple[int, ...] = ()
    # where the ranks draft: the tokens after each sampled one that may prove to be the last accepted one of its request
    drafts: tuple[DraftTokens, ...] = ()

    @staticmethod
    def joined(parts: Sequence[StepResult]) -> StepResult:
        """The results of several ranks as one."""
        return StepResult(
            tuple(token for part in parts for token in part.tokens),
            tuple(score for part in parts for score in part.prompt_scores),
            {request_id: error for part in parts for request_id, error in part.errors.items()},
            tuple(number for part in parts for number in part.failed_loads),
            tuple(number for part in parts for number in part.failed_saves),
            tuple(draft for part in parts for draft in part.drafts),
        )
