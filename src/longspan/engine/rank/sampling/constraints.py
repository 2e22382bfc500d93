"""Which tokens a request's parameters leave to sample: allowed tokens, bad words, and no end before `min_tokens`.

It owns these rules and how they join the mask of a grammar; it must not know of ranks or logits.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.engine.rank.sampling.grammar import Vocabulary
from longspan.engine.rank.sampling.rows import both, every_token, token_bits, without
from longspan.errors import RequestError
from longspan.request import SamplingParams


class Constraint:
    """The constraints on one output."""

    def __init__(self, params: SamplingParams, vocabulary: Vocabulary) -> None:
        self._params = params
        self._matcher = None if params.grammar is None else vocabulary.matcher(params.grammar)
        self._size = vocabulary.size
        self._ends = {token for token in (*params.stop_token_ids, *vocabulary.eos_token_ids) if token < self._size}
        listed = params.allowed_token_ids
        self._listed = None if listed is None else token_bits(listed, self._size)

    def masks(
        self, position: int, output_token_ids: Sequence[int], drafts: int = 0
    ) -> tuple[bytes | None, Sequence[int]]:
        """Which tokens may be at index `position` of the output, after `output_token_ids`, which are all before it.

        Returns (allowed, banned): `rows.token_bits` or None for all, and ids that are not sampled either. The output is
        read only where `params.needs_output`; its last `drafts` tokens are drafts. Raises `RequestError` if no token is
        left, or if a grammar does not allow the drafts.
        """
        early = self._ends if position < self._params.min_tokens else set()
        banned = self._ends_of_words(output_token_ids)
        allowed = None if self._matcher is None else self._matcher.allowed(output_token_ids, drafts)
        if self._listed is not None:
            allowed = self._listed if allowed is None else both(allowed, self._listed)
        if allowed is None and len(banned | early) < self._size:
            return None, sorted(banned | early)
        allowed = every_token(self._size) if allowed is None else allowed
        left = without(allowed, banned | early)
        if self._matcher is not None and not _any(left):  # the grammar is complete: an end is all that it allows
            left = without(allowed, banned)
        if not _any(left):
            raise RequestError(
                "allowed_token_ids", "[...]", f"leave no token for output position {position}",
                "allow more tokens, or give fewer bad_words and min_tokens",
            )  # fmt: skip
        return left, ()

    def _ends_of_words(self, output: Sequence[int]) -> set[int]:
        """The last tokens of the bad words whose other tokens are the end of the output."""
        return {end for *begin, end in self._params.bad_word_ids if not begin or list(output[-len(begin) :]) == begin}


def _any(bits: bytes) -> bool:
    return bits.count(0) < len(bits)
