"""Requests and outputs: sampling parameters, the core's requests, and what is returned to the user.

It owns these records and the checks on sampling parameters; it must not know how a request is
scheduled, sharded or computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import msgspec

from longspan.errors import RequestError


class FinishReason(StrEnum):
    """Why a completion ended. `stop` and `length` are OpenAI's values; `abort` and `error` are added."""

    # a stop token or a stop string
    STOP = "stop"
    # `max_tokens`, or the end of the context
    LENGTH = "length"
    # the caller aborted the request
    ABORT = "abort"
    # the completion could not be computed
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a completion stops. Names and meanings follow vLLM's.

    Raises `RequestError` for a value out of range.
    """

    # completions of the prompt
    n: int = 1
    # the most tokens to generate; None: until the context is full
    max_tokens: int | None = 16
    # divides the logits; 0 is greedy
    temperature: float = 1.0
    # sample among the most likely tokens whose probabilities add up to this
    top_p: float = 1.0
    # sample among this many of the most likely tokens; 0 or -1: among all
    top_k: int = 0
    # the lowest probability of a token that may be sampled, relative to that of the most likely one
    min_p: float = 0.0
    # divides positive logits, and multiplies negative ones, of tokens in the prompt or the output; 1 is none
    repetition_penalty: float = 1.0
    # subtracted from the logits of tokens in the output
    presence_penalty: float = 0.0
    # subtracted from a token's logit for each of its occurrences in the output
    frequency_penalty: float = 0.0
    # makes this request's tokens reproducible, however it is batched or sharded; None: derived from the engine's seed
    seed: int | None = None
    # number of tokens before which no stop token or stop string ends the completion: until then the model's end tokens
    # and `stop_token_ids` are not sampled. A grammar that is complete ends it all the same
    min_tokens: int = 0
    # strings that end the completion
    stop: str | Sequence[str] = ()
    # tokens that end the completion, beside the model's end tokens
    stop_token_ids: tuple[int, ...] = ()
    # whether generation continues after the model's end tokens
    ignore_eos: bool = False
    # whether the stop string is part of the text
    include_stop_str_in_output: bool = False
    # number of alternatives returned for each generated token; None: no log probabilities
    logprobs: int | None = None
    # number of alternatives returned for each token of the prompt; None: no log probabilities
    prompt_logprobs: int | None = None
    # (token id, value added to its logit)
    logit_bias: tuple[tuple[int, float], ...] = ()
    # the only tokens that may be sampled; None for all
    allowed_token_ids: tuple[int, ...] | None = None
    # words that are not generated: the last token of a word is not sampled after its other tokens. Each counts with and
    # without a space before it
    bad_words: tuple[str, ...] = ()
    # the same as token ids; the engine appends those of `bad_words`
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    # a grammar in the form of the grammar library, which the output must follow
    grammar: str | None = None
    # whether special tokens are left out of the text
    skip_special_tokens: bool = True
    # cached prefixes are shared among requests with the same salt only, so that timing does not reveal others' prompts
    cache_salt: str = ""
    # requests with lower numbers are admitted first and preempted last; only with `scheduling_policy="priority"`
    priority: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ("stop_token_ids", "bad_words"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "bad_word_ids", tuple(map(tuple, self.bad_word_ids)))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
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
        most = self.max_tokens
        _check(0 <= self.min_tokens < 1 << 31, "min_tokens", self.min_tokens, "must be in 0..2^31-1")
        _check(-1 << 31 <= self.priority < 1 << 31, "priority", self.priority, "must be in -2^31..2^31-1")
        _check(most is None or self.min_tokens <= most, "min_tokens", self.min_tokens, f"exceeds max_tokens={most}")
        _check(self.allowed_token_ids != (), "allowed_token_ids", [], "allows no token")
        words = list(self.bad_words)
        _check(all(map(str.strip, words)), "bad_words", words, "must not hold an empty string")
        _check(() not in self.bad_word_ids, "bad_word_ids", list(self.bad_word_ids), "must not hold an empty list")

    @cached_property
    def constrains(self) -> bool:
        """Whether some tokens may not be sampled."""
        lists = (self.grammar is not None, self.allowed_token_ids, self.bad_word_ids, self.min_tokens)
        return any(map(bool, lists))

    @cached_property
    def needs_history(self) -> bool:
        """Whether ranks must be told the tokens that the request has when it is admitted."""
        return self.penalises or self.needs_output or self.prompt_logprobs is not None

    @cached_property
    def needs_output(self) -> bool:
        """Whether the host must know every earlier token of the output before it can say what may be sampled."""
        return self.grammar is not None or any(len(word) > 1 for word in self.bad_word_ids)

    @cached_property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _check(ok: bool, name: str, value: object, problem: str) -> None:
    if not ok:
        raise RequestError(name, value, problem, f"change {name}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, in natural logarithms."""

    # log probability of the sampled token, or of the prompt's token
    sampled: float
    # the most likely tokens, best first
    top_ids: tuple[int, ...]
    # their log probabilities
    top_values: tuple[float, ...]


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token of one request, as a rank sampled it. A struct, because a step has hundreds."""

    # the completion's id, as in `CoreRequest`
    request_id: str
    # its id in the vocabulary
    token_id: int
    # None if they were not asked for
    logprobs: TokenLogprobs | None = None
    # its index in the output
    position: int = 0


@dataclass(frozen=True)
class PromptScore:
    """Log probabilities of one token of a prompt, given the tokens before it."""

    # the completion's id, as in `CoreRequest`
    request_id: str
    # the token's index in the prompt
    position: int
    # log probabilities of the token and of the most likely ones at its position
    logprobs: TokenLogprobs


@dataclass
class CompletionOutput:
    """One of the `n` completions of a request."""

    # its number, 0 to n - 1
    index: int
    # text so far
    text: str = ""
    # tokens so far
    token_ids: list[int] = field(default_factory=list)
    # one entry for each token; None if they were not asked for
    logprobs: list[TokenLogprobs] | None = None
    # None while it is running
    finish_reason: FinishReason | None = None
    # the stop string or stop token that ended it
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """The output of a request so far."""

    # the request's id
    request_id: str
    # the prompt's text; None if it was given as token ids
    prompt: str | None
    # the prompt's tokens
    prompt_token_ids: list[int]
    # its `n` completions
    outputs: list[CompletionOutput]
    # whether all completions have ended
    finished: bool = False
    # prompt tokens found in the prefix cache
    num_cached_tokens: int = 0
    # one entry for each prompt token, None for the first; empty if they were not asked for
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class CoreRequest:
    """One completion, as the engine core and the ranks compute it. A request with `n` completions is `n` of these."""

    # the same in the core, in plans and on ranks
    request_id: str
    # the prompt's tokens
    prompt_token_ids: Sequence[int]
    # the parameters of the user's request
    params: SamplingParams
    # seed of this completion; completions of one user's request have different seeds
    seed: int
    # the most tokens to generate, resolved against the context's length
    max_tokens: int
    # tokens generated before the core was restarted; generation continues after them
    output_token_ids: Sequence[int] = ()
    # addresses of instances that can compute the prompt, tried in this order
    prefill_at: tuple[str, ...] = ()
    # whether the prompt is computed for another instance, which will fetch its pages
    for_peer: bool = False
    # the same for all completions of one user's request, which take turns with other requests; empty if it is the only
    # one
    parent_id: str = ""


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The result of one step for one completion. A struct, because a step has hundreds."""

    # the completion's id
    request_id: str
    # new tokens; a stop token is the last of them
    tokens: tuple[SampledToken, ...]
    # None if the completion goes on
    finish_reason: FinishReason | None
    # prompt tokens found in the prefix cache when the completion was first admitted
    num_cached_tokens: int
    # one for each prompt token computed in the step, if prompt log probabilities were asked for
    prompt_scores: tuple[PromptScore, ...] = ()
    # the reason, where `finish_reason` is `FinishReason.ERROR`
    error: str | None = None
    # when a step first took it up, in `time.monotonic()` of the driver's machine; None before
    scheduled_at: float | None = None
