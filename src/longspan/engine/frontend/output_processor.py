"""Users' requests from arrival to their last output: their `n` completions, text and stop strings.

It owns requests and their outputs: it creates `CoreRequest`s and processes `TokenOutput`s. It must not know how tokens
are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import SupportsIndex

from longspan.engine.frontend.bad_words import bad_word_ids
from longspan.engine.frontend.completion import Completion
from longspan.engine.frontend.detokenizer import Detokenizer, Tokenizer
from longspan.engine.setup import EngineSetup
from longspan.errors import RequestError
from longspan.request import CoreRequest, FinishReason, RequestOutput, SamplingParams, TokenOutput

_CONTEXT_TOKENS = 16  # the prompt's last tokens for the detokenizer: a token's text may depend on those before it
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: makes the seeds of completions differ in most bits


@dataclass
class CoreCalls:
    """Calls that the caller must make on the core: first `add` for `start`, then `finish` for `finish`."""

    # completions to add
    start: list[CoreRequest] = field(default_factory=list)
    # ids of completions to end: aborted, or ended by a stop string
    finish: list[str] = field(default_factory=list)


@dataclass
class _Group:
    """One user's request and its `n` completions."""

    # what the user gets; updated in place
    output: RequestOutput
    # the user's parameters; with a grammar, EOS may be added to its stop tokens
    params: SamplingParams
    # the most tokens of each completion; a default has been resolved
    max_tokens: int
    # all `n`, in order
    completions: list[Completion]
    # those that wait until the first one has computed the prompt's pages, which they share
    unstarted: list[Completion]
    # addresses of instances that can compute the prompt
    prefill_at: tuple[str, ...] = ()
    # id of the request with which it shares its turns in the scheduler
    parent_id: str = ""


class OutputProcessor:
    """All unfinished requests. Its methods append to `core_calls`, which the caller carries out and empties."""

    def __init__(self, setup: EngineSetup, tokenizer: Tokenizer | None) -> None:
        self.setup = setup
        self._tokenizer = tokenizer
        self._numbers = count()  # one for each completion
        self._groups: dict[str, _Group] = {}  # by request id
        # started and unfinished completions, by their id in the core
        self._group_of: dict[str, tuple[_Group, Completion]] = {}
        self.core_calls = CoreCalls()

    def __len__(self) -> int:
        return len(self._groups)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[SupportsIndex],
        params: SamplingParams,
        prompt: str | None,
        prefill_at: tuple[str, ...] = (),
        parent_id: str = "",
    ) -> RequestOutput:
        """Add a request and return its output, which is updated in place.

        Requests of one `parent_id` share their turns in the scheduler, as the completions of each request do.
        Raises `RequestError` if the request can never be served.
        """
        if request_id in self._groups:
            raise RequestError("request_id", request_id, "is in use", "choose another")
        tokens = _integers(prompt_token_ids)
        self._check_known("prompt_token_ids", tokens)
        self._check_known("logit_bias", (token for token, _ in params.logit_bias))
        self._check_known("stop_token_ids", params.stop_token_ids)
        params = self._constrained(self._with_grammar_stop(params))
        max_tokens = self.setup.limits.check(len(tokens), params)
        completions = [self._completion(request_id, index, tokens, params) for index in range(params.n)]
        output = RequestOutput(request_id, prompt, tokens, [c.output for c in completions])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] * len(tokens)
        group = _Group(output, params, max_tokens, completions, completions[1:], prefill_at, parent_id or request_id)
        if max_tokens == 0 and params.prompt_logprobs is None:  # there is nothing to compute
            for completion in completions:
                completion.end(FinishReason.LENGTH)
            output.finished = True
            return output
        self._groups[request_id] = group
        self._start(group, completions[0])
        if not self.setup.config.cache.enable_prefix_caching:  # completions cannot share the prompt's pages
            self._start_rest(group)
        return output

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and return its output; None if it is unknown."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for completion in group.completions:
            if not completion.finished:
                self._drop(completion)
                completion.end(FinishReason.ABORT)
        return self._close(group)

    def take(self, outputs: Sequence[TokenOutput]) -> list[RequestOutput]:
        """Add tokens to their completions; returns the requests that changed. Tokens of ended requests are ignored."""
        changed: dict[str, RequestOutput] = {}
        for tokens in outputs:
            if tokens.request_id not in self._group_of:
                continue
            group, completion = self._group_of[tokens.request_id]
            if completion.index == 0:
                group.output.num_cached_tokens = tokens.num_cached_tokens
                for score in tokens.prompt_scores:
                    group.output.prompt_logprobs[score.position] = score.logprobs
            completion.take(tokens)
            if completion.finished:
                self._drop(completion, ended_by_core=tokens.finish_reason is not None)
            self._start_rest(group)
            if all(c.finished for c in group.completions):
                self._close(group)
            changed[group.output.request_id] = group.output
        return list(changed.values())

    def resume(self) -> list[CoreRequest]:
        """Requests for all unfinished completions, with the tokens that they have, for a new core after a failure."""
        return [self._core_request(*entry) for entry in self._group_of.values()]

    def core_ids(self, request_id: str) -> list[str]:
        """Ids of a request's completions in the core, in order; empty if the request is unknown."""
        group = self._groups.get(request_id)
        return [completion.request_id for completion in group.completions] if group else []

    def request_of(self, core_id: str) -> RequestOutput | None:
        """The output of the request that a completion belongs to; None if the completion has ended."""
        entry = self._group_of.get(core_id)
        return entry[0].output if entry else None

    def _with_grammar_stop(self, params: SamplingParams) -> SamplingParams:
        """With a grammar, add the tokenizer's EOS to the stop tokens if the model has none: it ends the grammar."""
        if params.grammar is None:
            return params
        if self._tokenizer is None:
            raise RequestError("grammar", "...", "needs a tokenizer and this model has none", "leave it out")
        end = getattr(self._tokenizer, "eos_token_id", None)
        if end is None or self.setup.model.eos_token_ids:
            return params
        return replace(params, stop_token_ids=(*params.stop_token_ids, int(end)))

    def _constrained(self, params: SamplingParams) -> SamplingParams:
        """Check what orders and constrains a request, and turn its bad words into tokens."""
        policy = self.setup.config.scheduler.scheduling_policy
        if params.priority and policy != "priority":
            remedy = "use scheduling_policy=priority (--scheduling-policy priority)"
            raise RequestError(
                "priority", params.priority, f"counts for nothing under scheduling_policy={policy}", remedy
            )
        self._check_known("allowed_token_ids", params.allowed_token_ids or ())
        words = (*params.bad_word_ids, *bad_word_ids(self._tokenizer, params.bad_words))
        self._check_known("bad_word_ids", (token for word in words for token in word))
        return replace(params, bad_words=(), bad_word_ids=words) if params.bad_words else params

    def _check_known(self, field_name: str, tokens: Iterable[int]) -> None:
        last = self.setup.model.vocab_size - 1
        for token in tokens:
            if not 0 <= token <= last:
                raise RequestError(field_name, token, f"is not in 0..{last}", "check the tokenizer")

    def _completion(self, request_id: str, index: int, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """A new completion. Its id in the core is never used again, because steps in flight may name an ended one."""
        number = next(self._numbers)
        seed = self.setup.config.seed if params.seed is None else params.seed
        # with the user's seed, tokens must not depend on the number of earlier requests
        own = number if params.seed is None else index
        detokenizer = Detokenizer(self._tokenizer, params, tokens[-_CONTEXT_TOKENS:])
        own_seed = (seed + own * _SEED_STRIDE) % (1 << 63)
        return Completion(f"{request_id}.{number}", index, params, own_seed, detokenizer)

    def _start(self, group: _Group, completion: Completion) -> None:
        self._group_of[completion.request_id] = (group, completion)
        self.core_calls.start.append(self._core_request(group, completion))

    def _start_rest(self, group: _Group) -> None:
        """Start the other completions: the prompt's pages are in the prefix cache now, and are shared."""
        for completion in group.unstarted:
            self._start(group, completion)
        group.unstarted = []

    def _core_request(self, group: _Group, completion: Completion) -> CoreRequest:
        first = completion.index == 0  # only the first scores the prompt, which is the same for all
        params = group.params if first else replace(group.params, prompt_logprobs=None)
        return CoreRequest(
            completion.request_id, group.output.prompt_token_ids, params, completion.seed, max(group.max_tokens, 1),
            tuple(completion.output.token_ids), group.prefill_at, parent_id=group.parent_id,
        )  # fmt: skip

    def _drop(self, completion: Completion, ended_by_core: bool = False) -> None:
        """Remove a completion that has ended, and let the core end it too unless it has done so already."""
        if self._group_of.pop(completion.request_id, None) and not ended_by_core:
            self.core_calls.finish.append(completion.request_id)

    def _close(self, group: _Group) -> RequestOutput:
        group.output.finished = True
        del self._groups[group.output.request_id]
        return group.output


def _integers(prompt_token_ids: Sequence[SupportsIndex]) -> list[int]:
    """Token ids as Python integers, from integers of any type. Raises `RequestError`."""
    try:
        return [operator.index(token) for token in prompt_token_ids]
    except TypeError as error:
        raise RequestError("prompt_token_ids", prompt_token_ids, f"are not integers ({error})", "give ids") from error
