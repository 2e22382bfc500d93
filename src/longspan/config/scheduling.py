"""How requests are batched: limits of a step, of a request and of the requests that run at once.

It owns the limits that are in effect; it must not know requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longspan.config.checks import require, require_choice
from longspan.config.option import option
from longspan.config.speculation import Speculation

DEFAULT_LOCAL_CONTEXT = 512
DEFAULT_STEP_TOKENS, DEFAULT_RUNNING = 2048, 256
FIXED_ROWS, GPU_FIXED_ROWS = 8, 128  # an H100 reads bf16 weights in the time of some 300 rows' products
GPU_STEP_TOKENS = 8192  # of each PCP rank: fewer leave a GPU waiting for its host
SCHEDULING_POLICY_NAMES = ("fcfs", "priority")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How requests are batched. `step_tokens`, `running_limit` and `local_limit` are the effective limits."""

    max_num_batched_tokens: int | None = option(
        None,
        "new tokens per step over all ranks; default: 2048 on a CPU, 8192 for each PCP rank on GPUs, or "
        "max_num_seqs if that is more",
    )
    max_num_seqs: int | None = option(
        None, "maximum requests that run at once; default: 256, or the tokens of a step if fewer"
    )
    max_model_len: int | None = option(None, "tokens of prompt and completion; default: the model's own limit")
    local_context: int | None = option(
        None, "contexts of up to this many tokens stay on one shard; default: 512, or what a shard holds if less"
    )
    schedule: str = option("auto", "attention schedule, that is, what ranks exchange")
    speculative: Speculation | None = option(
        None, "speculative decoding: prompt-lookup:K drafts up to K tokens (1 to 64) from the request's own text, "
        "mtp:K (1 to 8) with the model's module for multi-token prediction, draft:K:MODEL (1 to 8) with a small model "
        "of the same vocabulary, eagle3:K:PATH (1 to 8) with an EAGLE-3 checkpoint",
        parse=Speculation.parse,
    )  # fmt: skip
    async_scheduling: bool | None = option(None, "plan a step while the one before it runs; default: on GPUs")
    scheduling_policy: str = option(
        "fcfs", "fcfs (first come, first served) or priority (requests with a lower `priority` first)"
    )
    fixed_rows: int = FIXED_ROWS  # rows that take as long as what a step does for any rows, as reading the weights

    def __post_init__(self) -> None:
        require_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICY_NAMES)
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None:
                require(value >= 1, name, value, "must be at least 1", "give a positive number")
        if self.max_model_len is not None:
            require(
                self.max_model_len >= 1,
                "max_model_len",
                self.max_model_len,
                "must be at least 1",
                "give a positive number of tokens, or leave it out to use the model's own limit",
            )
        if self.local_context is not None:
            require(
                self.local_context >= 0, "local_context", self.local_context, "must not be negative",
                "use 0 to spread every context",
            )  # fmt: skip
        require(
            self.running_limit <= self.step_tokens,
            "max_num_seqs",
            self.running_limit,
            f"exceeds max_num_batched_tokens={self.step_tokens}, so a full batch could not decode",
            "lower max_num_seqs, raise max_num_batched_tokens, or leave one of them out",
        )

    @property
    def step_tokens(self) -> int:
        """Maximum new tokens of a step: the given number, or 2048, or max_num_seqs if that is more.

        On GPUs `on_gpus` gives a number.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_STEP_TOKENS, self.max_num_seqs or 0)

    @property
    def running_limit(self) -> int:
        """Maximum requests that run at once: the given number, or 256, or the tokens of a step if fewer."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(DEFAULT_RUNNING, self.step_tokens)

    @property
    def local_limit(self) -> int:
        """Maximum tokens of a context that stays on one shard: the given number, or 512. See `on_shards`."""
        return DEFAULT_LOCAL_CONTEXT if self.local_context is None else self.local_context

    def on_gpus(self, pcp: int) -> SchedulerConfig:
        """A copy for `pcp` ranks that share the tokens of a step on GPUs. A given number of tokens is kept."""
        tokens = self.max_num_batched_tokens or max(GPU_STEP_TOKENS * pcp, self.max_num_seqs or 0)
        return replace(self, max_num_batched_tokens=tokens, fixed_rows=GPU_FIXED_ROWS)

    def on_shards(self, tokens: int) -> SchedulerConfig:
        """A copy with `local_context` set, for shards of which the largest holds `tokens`. Raises `ConfigError`."""
        asked = self.local_context
        if asked is not None:
            require(
                asked <= tokens, "local_context", asked, f"exceeds the {tokens} tokens the largest shard holds",
                f"use at most {tokens}, or give the KV cache more memory",
            )  # fmt: skip
        return replace(self, local_context=min(self.local_limit, tokens))
