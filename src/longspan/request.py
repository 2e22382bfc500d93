"""What a user asks for and what comes back: sampling parameters, requests and outputs.

It owns these records and the checks on sampling parameters; it must not know how a request is
scheduled, sharded or computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from longspan.errors import RequestError


class FinishReason(StrEnum):
    """Why a completion ended, in OpenAI's words plus `abort` and `error`: this one could not be computed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; names and meanings follow vLLM's.

    temperature 0 is greedy. `top_k` 0 or -1 means all tokens. `seed` fixes the tokens of this
    request however it is batched or sharded. `logprobs` asks for that many alternatives a token,
    `prompt_logprobs` for those of the prompt's tokens. `logit_bias` are (token id, what is added to its logit).
    `grammar` (the grammar library's own form) binds what may be generated. `max_tokens` None means "until the context
    is full".
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    skip_special_tokens: bool = True
    # cached prefixes are shared among requests of one salt only, so that nobody learns what others have sent
    cache_salt: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check(self.n >= 1, "n", self.n, "must be at least 1")
        _check(
            self.max_tokens is None or self.max_tokens >= 0,
            "max_tokens",
            self.max_tokens,
            "must not be negative",
        )
        _check(0 <= self.temperature <= 100, "temperature", self.temperature, "must be in 0..100; 0 is greedy")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        _check(-1 <= self.top_k < 1 << 31, "top_k", self.top_k, "must be -1, 0 (both: all tokens) or positive")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-2 <= value <= 2, name, value, "must be in [-2, 2]")
        _check(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "must be positive; 1 is none",
        )
        _check(self.seed is None or 0 <= self.seed < 1 << 63, "seed", self.seed, "must be in 0..2^63-1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= 100, name, value, "must be in 0..100")
        _check("" not in self.stop, "stop", list(self.stop), "must not hold an empty string")

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must see the request's earlier tokens."""
        return self.penalises or self.grammar is not None or self.prompt_logprobs is not None

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _check(ok: bool, name: str, value: object, problem: str) -> None:
    if not ok:
        raise RequestError(name, value, problem, f"change {name}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of the sampled token and of the most likely ones, best first."""

    sampled: float
    top_ids: tuple[int, ...]
    top_values: tuple[float, ...]


@dataclass(frozen=True)
class SampledToken:
    """One token of one request, as a rank sampled it."""

    request_id: str
    token_id: int
    # if they were asked for
    logprobs: TokenLogprobs | None = None
    # its index in the output
    position: int = field(default=0, compare=False)


@dataclass(frozen=True)
class PromptScore:
    """How likely one of a prompt's own tokens was, after those before it."""

    request_id: str
    # its index in the prompt
    position: int
    logprobs: TokenLogprobs


@dataclass
class CompletionOutput:
    """One of the `n` completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """What has become of a request so far. `outputs` holds its `n` completions.

    `prompt_logprobs`, if asked for, has one entry a prompt token: None for the first, which nothing precedes.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class CoreRequest:
    """One completion."""

    # what it is called from here to the ranks and back
    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    # its own: completions of one user's request have different ones
    seed: int
    max_tokens: int
    # those it already has: a core that starts anew continues after them
    output_token_ids: Sequence[int] = ()
    # instances that can compute its prompt, to be asked in this order
    prefill_at: tuple[str, ...] = ()
    # whether its prompt is computed for another instance, which will fetch its pages
    for_peer: bool = False


@dataclass(frozen=True)
class TokenOutput:
    """What a step gave one completion."""

    request_id: str
    # new ones; the token that stops it is the last
    tokens: tuple[SampledToken, ...]
    # why it has ended, None if it goes on
    finish_reason: FinishReason | None
    # of its prompt, when it was first admitted
    num_cached_tokens: int
    # of prompt tokens computed in the step, if they are asked for
    prompt_scores: tuple[PromptScore, ...] = ()
    # why it could not go on, with `FinishReason.ERROR`
    error: str | None = None
