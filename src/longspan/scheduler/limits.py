"""How many tokens one request may have, and the errors for requests that can never be served.

It owns the arithmetic of lengths; it must not know which requests are waiting or running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.errors import ContextOverflow, RequestError
from longspan.request import SamplingParams


@dataclass(frozen=True)
class Limits:
    """The largest request that an engine can serve."""

    # most prompt and output tokens, as configured
    max_model_len: int
    # most tokens whose KV one request can store
    cache_tokens: int

    @staticmethod
    def of(max_model_len: int, schedule: str, pages_per_shard: Sequence[int], page_size: int) -> Limits:
        """The limits of an engine. Under `--schedule local` a request may use the pages of one shard, else of all."""
        usable = max(pages_per_shard) if schedule == "local" else sum(pages_per_shard)
        return Limits(max_model_len, usable * page_size)

    @property
    def context(self) -> int:
        """Most prompt and output tokens of one request: one more than fit in the cache, as the last is not stored."""
        return min(self.max_model_len, self.cache_tokens + 1)

    def check(self, num_prompt: int, params: SamplingParams) -> int:
        """The request's `max_tokens`, or its default. Raises `RequestError` if the request can never be served."""
        if num_prompt == 0:
            raise RequestError("prompt", "''", "is empty", "give at least one token")
        limit = self.context
        limit_name = "max_model_len" if limit == self.max_model_len else "the KV cache"
        max_tokens = params.max_tokens if params.max_tokens is not None else max(limit - num_prompt, 1)
        if num_prompt + max_tokens > limit:
            field, value = ("prompt", f"[{num_prompt} tokens]") if num_prompt >= limit else ("max_tokens", max_tokens)
            raise ContextOverflow(
                field, value,
                f"{num_prompt} prompt tokens and max_tokens={max_tokens} exceed the {limit} tokens that"
                f" {limit_name} allows one request (max_model_len={self.max_model_len}, KV cache"
                f" {self.cache_tokens} tokens)",
                "shorten the prompt, lower max_tokens, or give the engine more KV memory or context ranks"
                if limit_name == "the KV cache" else "shorten the prompt, lower max_tokens or raise --max-model-len",
            )  # fmt: skip
        return max_tokens
