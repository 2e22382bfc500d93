"""Token masks of grammars (structured output), computed where tokens are sampled.

It owns the grammar library's matchers; it must not know of ranks or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.errors import RequestError

_MAX_KEPT = 16  # grammars whose matchers are copied, not made again


class Vocabulary:
    """The model's tokens in the form of the grammar library. The tokenizer is loaded for the first grammar."""

    def __init__(self, load_tokenizer: Callable[[], Any], size: int, eos_token_ids: Sequence[int]) -> None:
        self._load = load_tokenizer
        self._size = size
        self._eos = list(eos_token_ids)
        self._tokens: Any = None
        self._made: OrderedDict[str, Any] = OrderedDict()  # a matcher at its start, by grammar

    def matcher(self, grammar: str) -> Matcher:
        """A matcher for a new output. If the grammar cannot be read, `Matcher.allowed` raises the reason."""
        try:
            return Matcher(self._start(grammar).deep_copy(), self._size)
        except Exception as error:  # an error of the library must fail this request only, not the rank
            return Matcher(None, self._size, f"{type(error).__name__}: {error}")

    def _start(self, grammar: str) -> Any:
        """A matcher at its start. Making one may take half a second, and `n` completions share a grammar."""
        from llguidance import LLMatcher

        if grammar not in self._made:
            if self._tokens is None:
                self._tokens = self._read()
            self._made[grammar] = LLMatcher(self._tokens, grammar)
        self._made.move_to_end(grammar)
        while len(self._made) > _MAX_KEPT:
            self._made.popitem(last=False)
        return self._made[grammar]

    def _read(self) -> Any:
        from llguidance.hf import from_tokenizer

        tokenizer = self._load()
        if tokenizer is None:
            raise RequestError("grammar", "...", "needs the model's tokenizer, and it has none", "leave it out")
        return from_tokenizer(tokenizer, n_vocab=max(self._size, len(tokenizer)), eos_token=self._eos or None)


class Matcher:
    """Follows one output under a grammar."""

    def __init__(self, matcher: Any, size: int, failure: str = "") -> None:
        self._matcher = matcher
        self._failure = failure
        self._size = size
        self._seen = 0

    def allowed(self, output_token_ids: Sequence[int]) -> Tensor:
        """Bool [vocab]: which tokens may follow the output. The output must begin with that of the previous call.

        Raises `RequestError` if the grammar cannot be followed any further.
        """
        self._require(not self._failure, lambda: self._failure)
        fresh = list(output_token_ids[self._seen :])
        if fresh and not self._matcher.is_stopped():
            self._matcher.consume_tokens(fresh)
        self._seen = len(output_token_ids)
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._require(not self._matcher.is_error(), self._matcher.get_error)
        bits = words[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        allowed = bits.reshape(-1)[: self._size].bool()
        self._require(bool(allowed.any()), lambda: "no token may follow")
        return allowed

    def _require(self, ok: bool, problem: Callable[[], str]) -> None:
        if not ok:
            self._failure = problem()
            raise RequestError(
                "response_format", "...", f"cannot be followed ({self._failure})", "use a simpler schema"
            )
