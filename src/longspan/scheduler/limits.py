"""What one request may ask for, and the refusal of what can never be served.

It owns the arithmetic of lengths; it must not know of requests that are already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.errors import ContextOverflow, RequestError
from longspan.request import SamplingParams


@dataclass(frozen=True)
class Limits:
    """`max_model_len` counts prompt and output tokens, `cache_tokens` the KV that one request can ever hold."""

    max_model_len: int
    cache_tokens: int

    @staticmethod
    def of(max_model_len: int, schedule: str, pages_per_shard: Sequence[int], page_size: int) -> Limits:
        """Under `--schedule local` a request lives on one shard, else on all."""
        usable = max(pages_per_shard) if schedule == "local" else sum(pages_per_shard)
        return Limits(max_model_len, usable * page_size)

    @property
    def context(self) -> int:
        """The most prompt and output tokens of one request; the last token's KV is never stored."""
        return min(self.max_model_len, self.cache_tokens + 1)

    def check(self, num_prompt: int, params: SamplingParams) -> int:
        """The request's max_tokens, resolved; raises `RequestError` if it can never be served."""
        if num_prompt == 0:
            raise RequestError("prompt", "''", "is empty", "give at least one token")
        limit = self.context
        limit_name = "max_model_len" if limit == self.max_model_len else "the KV cache"
        max_tokens = params.max_tokens if params.max_tokens is not None else max(limit - num_prompt, 1)
        if num_prompt + max_tokens > limit:
            raise ContextOverflow(
                "prompt + max_tokens", num_prompt + max_tokens,
                f"{num_prompt} prompt tokens and max_tokens={max_tokens} exceed the {limit} tokens that"
                f" {limit_name} allows one request (max_model_len={self.max_model_len}, KV cache"
                f" {self.cache_tokens} tokens)",
                "shorten the prompt, lower max_tokens, or give the engine more KV memory or context ranks"
                if limit_name == "the KV cache" else "shorten the prompt, lower max_tokens or raise --max-model-len",
            )  # fmt: skip
        return max_tokens
