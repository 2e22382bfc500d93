"""`/v1/chat/completions`: conversations, with tools.

It owns the formats of request and answer; `text.py` applies the chat template, and `tools/` parses tool calls.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from longspan.errors import RequestError
from longspan.request import CompletionOutput, RequestOutput, SamplingParams, TokenLogprobs
from longspan.server.async_engine import Job
from longspan.server.conversation import MAX_FIELDS, Messages, TemplateFields, conversation
from longspan.server.fields import GenerationBody
from longspan.server.replies import Cursor, TextDelta, identity, prompt_scores, usage
from longspan.server.served import ServedModel
from longspan.server.text import Text
from longspan.server.tool_choice import ForcedCalls, ToolChoice, Tools, chosen_tools
from longspan.server.tools import ToolCall, ToolParser
from longspan.server.tools.forced import CallListReader

_MAX_TOP_LOGPROBS = 20
_Metadata = Annotated[dict[str, str], Field(max_length=MAX_FIELDS)]


class ChatBody(GenerationBody, TemplateFields):
    """The body of a chat completion."""

    messages: Messages = Field(min_length=1)
    max_tokens: int | None = Field(default=None, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, description="default: until the context is full")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="whether required calls may be several")
    add_special_tokens: bool | None = Field(
        default=None, description="not OpenAI's: begin with BOS even if the template writes none; default false"
    )
    return_token_ids: bool | None = Field(default=None, description="not OpenAI's: add token_ids to each choice")
    metadata: _Metadata | None = Field(default=None, description="taken, not used")
    store: bool | None = Field(default=None, description="taken, not used")
    reasoning_effort: str | None = Field(default=None, description="taken, not used")
    verbosity: str | None = Field(default=None, description="taken, not used")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=MAX_FIELDS)] | None = None

    async def reply(self, text: Text, served: ServedModel) -> ChatReply:
        """Tokenise the conversation and make the reply, which has no output yet. Raises `RequestError`."""
        tools, forced = chosen_tools(self.tool_choice, self.tools or (), self.parallel_tool_calls is not False)
        options = self.template_options(served.trusts_templates)
        params = partial(self._params, served, forced)
        found = await text.run_grammar(params) if forced or self.response_format else params()
        keep = self.tokens_kept(text.max_model_len, found.max_tokens)
        talk = partial(conversation, self.messages, tools)
        tokens = await text.chat(talk, options, self.num_bytes, bool(self.add_special_tokens), keep)
        parse = served.tool_format if tools and forced is None else None
        return ChatReply(self, Job(tokens, found), text, served.name, parse, forced)

    @property
    def prompt_field(self) -> str:
        """See `GenerationBody.prompt_field`."""
        return "messages"

    @property
    def limit_field(self) -> str | None:
        """See `GenerationBody.limit_field`."""
        given = (name for name in ("max_completion_tokens", "max_tokens") if getattr(self, name) is not None)
        return next(given, None)

    def _params(self, served: ServedModel, forced: ForcedCalls | None) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit == 0:
            raise RequestError("max_tokens", 0, "leaves no room for an answer", "give at least 1")
        top = self.top_logprobs
        if top is not None and not (self.logprobs and 0 <= top <= _MAX_TOP_LOGPROBS):
            raise RequestError(
                "top_logprobs", top, f"must be in 0..{_MAX_TOP_LOGPROBS}, and needs logprobs", "set logprobs to true"
            )
        logprobs = (top or 0) if self.logprobs else None
        return self.sampling(served, limit, logprobs, None if forced is None else forced.grammar())


class ChatReply:
    """See `Reply`. Tool calls are parsed from the text by `tool_format`.

    If calls are `forced`, the whole text is made of them.
    """

    def __init__(
        self, body: ChatBody, job: Job, text: Text, model: str, tool_format: str | None, forced: ForcedCalls | None
    ) -> None:
        self.jobs = [job]
        self.stream_options = body.usage_in_stream
        self._body = body
        self._text = text
        self._identity = identity("chatcmpl", "chat.completion", model, body.request_id)
        self._tool_format = tool_format
        self._forced = forced
        self._cursors: list[Cursor] = []
        self._parsers: list[_Calls] = []

    def envelope(self) -> dict[str, Any]:
        """See `Reply.envelope`."""
        return {**self._identity, "object": "chat.completion.chunk"}

    def open(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """See `Reply.open`."""
        (output,) = outputs
        self._cursors = [Cursor(completion, bool(self._body.return_token_ids)) for completion in output.outputs]
        self._parsers = [_Calls(self._tool_format, self._forced) for _ in output.outputs]
        return [
            self._chunk(index, {"role": "assistant", "content": ""}, None, None) for index in range(len(output.outputs))
        ]

    def chunks(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """See `Reply.chunks`."""
        found: list[dict[str, Any]] = []
        for completion in (completion for output in outputs for completion in output.outputs):
            delta = self._cursors[completion.index].delta()
            if not delta.worth_sending:
                continue
            calls = self._parsers[completion.index]
            change = calls.change(delta)
            wanted = delta.logprobs is not None or self._body.return_token_ids
            if change or delta.finish_reason or (wanted and delta.tokens):
                found.append(self._chunk(completion.index, change, delta, calls.reason(delta.finish_reason)))
        return found

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See `Reply.whole`."""
        (output,) = outputs
        choices = [self._choice(completion) for completion in output.outputs]
        scores = prompt_scores(output, self._text) if self._body.prompt_logprobs is not None else None
        asked = {} if scores is None else {"prompt_logprobs": scores}
        return {**self._identity, "choices": choices, "usage": usage(outputs), **asked}

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        delta = Cursor(completion, False).delta()
        calls = _Calls(self._tool_format, self._forced)
        change = calls.change(delta)
        made = [
            {name: value for name, value in call.items() if name != "index"} for call in change.get("tool_calls", [])
        ]
        content = change.get("content")
        message: dict[str, Any] = {"role": "assistant", "content": content if made else content or ""}
        if made:
            message["tool_calls"] = made
        return {
            "index": completion.index, "message": message, "logprobs": self._logprobs(delta),
            "finish_reason": calls.reason(delta.finish_reason), "stop_reason": delta.stop_reason, **self._ids(delta),
        }  # fmt: skip

    def _chunk(self, index: int, change: dict[str, Any], delta: TextDelta | None, reason: str | None) -> dict[str, Any]:
        choice = {
            "index": index, "delta": change, "logprobs": self._logprobs(delta) if delta else None,
            "finish_reason": reason, **(self._ids(delta) if delta else {}),
        }  # fmt: skip
        return {**self.envelope(), "choices": [choice]}

    def _ids(self, delta: TextDelta) -> dict[str, Any]:
        return {"token_ids": list(delta.tokens)} if self._body.return_token_ids else {}

    def _logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        rows = zip(delta.tokens, delta.logprobs, strict=True)
        return {"content": [self._row(token_id, row) for token_id, row in rows]}

    def _row(self, token_id: int, row: TokenLogprobs) -> dict[str, Any]:
        top = [self._entry(other, value) for other, value in zip(row.top_ids, row.top_values, strict=True)]
        return {**self._entry(token_id, row.sampled), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._text.token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


class _Calls:
    """The tool calls in one completion's text."""

    def __init__(self, tool_format: str | None, forced: ForcedCalls | None) -> None:
        self._parser = ToolParser(tool_format) if tool_format else None
        self._forced = forced
        self._reader = CallListReader()
        self._made = 0

    def change(self, delta: TextDelta) -> dict[str, Any]:
        """The fields that a delta adds to the message: `content`, `tool_calls`, or neither."""
        if self._forced is not None:
            made = self._forced_calls(self._forced, delta.text)
            return {"tool_calls": made} if made else {}
        if self._parser is None:
            return {"content": delta.text} if delta.text else {}
        parsed = self._parser.append(delta.text)
        content, calls = parsed.content, parsed.calls
        if delta.finish_reason:
            rest = self._parser.finish()
            content, calls = content + rest.content, (*calls, *rest.calls)
        change: dict[str, Any] = {"content": content} if content else {}
        if calls:
            change["tool_calls"] = [self._call(call) for call in calls]
        return change

    def reason(self, reason: str | None) -> str | None:
        """The finish reason: `tool_calls` in place of `stop` if the completion has made calls that no name required."""
        called = "tool_calls" if self._forced is None else self._forced.finish_reason
        return called if reason == "stop" and self._made else reason

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._made += 1
        return {
            "index": self._made - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }  # fmt: skip

    def _forced_calls(self, forced: ForcedCalls, text: str) -> list[dict[str, Any]]:
        """The pieces of calls in more text: a name with the first of its arguments, afterwards arguments alone."""
        if not forced.named:
            return [self._piece(piece.name, piece.arguments) for piece in self._reader.append(text)]
        return [self._piece(None if self._made else forced.functions[0].name, text)] if text else []

    def _piece(self, name: str | None, arguments: str) -> dict[str, Any]:
        if name is not None:
            return self._call(ToolCall(name, arguments))
        return {"index": self._made - 1, "function": {"arguments": arguments}}
