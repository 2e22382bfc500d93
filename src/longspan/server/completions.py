"""`/v1/completions`: continuations of one or more prompts.

It owns the formats of request and answer; sampling and streaming are common to all endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import Field

from longspan.errors import RequestError
from longspan.request import RequestOutput, TokenLogprobs
from longspan.server.async_engine import Job
from longspan.server.fields import GenerationBody, Ids
from longspan.server.replies import Cursor, TextDelta, identity, prompt_scores, usage
from longspan.server.served import ServedModel
from longspan.server.text import Text, last_tokens

_DEFAULT_MAX_TOKENS = 16
_MAX_PROMPTS = 1024
Prompt = TypeVar("Prompt")
_Prompts = Annotated[list[Prompt], Field(fail_fast=True, max_length=_MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """The body of a completion."""

    prompt: str | Ids | _Prompts[str] | _Prompts[Ids] = Field(description="text, token ids, or a list of either")
    max_tokens: int | None = Field(default=None, description="default 16; 0 is allowed")
    max_completion_tokens: int | None = Field(default=None, description="the chats' name of max_tokens")
    logprobs: int | None = Field(default=None, description="that many alternatives a token")
    echo: bool | None = Field(default=None, description="begin with the prompt")
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = Field(default=None, description="not OpenAI's: begin with BOS if the model does")
    return_token_ids: bool | None = Field(default=None, description="not OpenAI's: add token_ids to each choice")

    @property
    def limit_field(self) -> str | None:
        """See `GenerationBody.limit_field`."""
        given = (name for name in ("max_tokens", "max_completion_tokens") if getattr(self, name) is not None)
        return next(given, None)

    async def reply(self, text: Text, served: ServedModel) -> CompletionReply:
        """Tokenise the prompts and make the reply, which has no output yet. Raises `RequestError`."""
        if self.suffix:
            raise RequestError("suffix", repr(self.suffix[:20]), "is not supported", "leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of", self.best_of, "is supported only if equal to n", "leave it out")
        given = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        max_tokens = _DEFAULT_MAX_TOKENS if given is None else given
        prompt_logprobs = self.logprobs if self.echo else None
        sampling = partial(self.sampling, served, max_tokens, self.logprobs, prompt_logprobs=prompt_logprobs)
        params = await text.run_grammar(sampling) if self.response_format else sampling()
        special = self.add_special_tokens is not False
        keep = self.tokens_kept(text.max_model_len, max_tokens)
        jobs: list[Job] = []
        for prompt in self._prompts():
            if isinstance(prompt, str):
                tokens = await text.encode(prompt, special, keep=keep)
            else:
                tokens = last_tokens(prompt, keep)
            echoed = prompt if isinstance(prompt, str) and keep is None else None
            if self.echo and echoed is None and text.tokenizer is not None:
                echoed = await text.decode(tokens)
            jobs.append(Job(tokens, params, echoed))
        return CompletionReply(self, jobs, text, served.name)

    def _prompts(self) -> list[str] | list[list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt", "[]", "is empty", "give at least one token")
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt


class CompletionReply:
    """See `Reply`."""

    def __init__(self, body: CompletionBody, jobs: list[Job], text: Text, model: str) -> None:
        self.jobs = jobs
        self.stream_options = body.usage_in_stream
        self._body = body
        self._text = text
        self._identity = identity("cmpl", "text_completion", model, body.request_id)
        self._first: dict[str, int] = {}  # index of each request's first choice
        self._cursors: dict[int, Cursor] = {}
        self._offsets: dict[int, int] = {}
        self._echoed: set[int] = set()

    def envelope(self) -> dict[str, Any]:
        """See `Reply.envelope`."""
        return self._identity

    def open(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """See `Reply.open`."""
        choices = 0
        for output in outputs:
            self._first[output.request_id] = choices
            for completion in output.outputs:
                self._cursors[choices + completion.index] = Cursor(completion, bool(self._body.return_token_ids))
            choices += len(output.outputs)
        return self.chunks([output for output in outputs if output.finished])

    def chunks(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """See `Reply.chunks`."""
        found: list[dict[str, Any]] = []
        for output in outputs:
            for completion in output.outputs:
                index = self._first[output.request_id] + completion.index
                delta = self._cursors[index].delta()
                if delta.worth_sending:
                    choice = self._choice(index, output, delta)
                    found.append({**self.envelope(), "choices": [choice]})
        return found

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See `Reply.whole`."""
        everything = [(output, Cursor(choice, False).delta()) for output in outputs for choice in output.outputs]
        choices = [self._choice(index, output, delta) for index, (output, delta) in enumerate(everything)]
        return {**self.envelope(), "choices": choices, "usage": usage(outputs)}

    def _choice(self, index: int, output: RequestOutput, delta: TextDelta) -> dict[str, Any]:
        """A choice with a delta. With `echo` the first one of a choice begins with the prompt."""
        echo = bool(self._body.echo) and index not in self._echoed
        self._echoed.add(index)
        prompt = (output.prompt or "") if echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt + delta.text,
            "logprobs": None if delta.logprobs is None else self._logprobs(index, output, delta, echo),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(output, self._text)
        if self._body.return_token_ids:
            choice["token_ids"] = [*(output.prompt_token_ids if echo else ()), *delta.tokens]
        return choice

    def _logprobs(self, index: int, output: RequestOutput, delta: TextDelta, echo: bool) -> dict[str, Any]:
        rows: list[tuple[int, TokenLogprobs | None]] = list(zip(delta.tokens, delta.logprobs or (), strict=False))
        if echo:
            rows = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=False), *rows]
        lines: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, row in rows:
            token = self._text.token(token_id)
            offset = self._offsets.get(index, 0)
            lines["tokens"].append(token)
            lines["token_logprobs"].append(None if row is None else row.sampled)
            lines["top_logprobs"].append(None if row is None else self._top(token, row))
            lines["text_offset"].append(offset)
            self._offsets[index] = offset + len(token)
        return lines

    def _top(self, token: str, row: TokenLogprobs) -> dict[str, float]:
        best = {self._text.token(other): value for other, value in zip(row.top_ids, row.top_values, strict=True)}
        return {token: row.sampled, **best} if best else {}
