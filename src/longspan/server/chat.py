"""`/v1/chat/completions`: conversations, with tools.

It owns the formats of request and answer; `text.py` applies the chat template, and `tools/` parses tool calls.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from longspan.errors import RequestError
from longspan.request import CompletionOutput, RequestOutput, SamplingParams, TokenLogprobs
from longspan.server.async_engine import Job
from longspan.server.bodies import JsonBounds
from longspan.server.errors import shortened
from longspan.server.fields import Body, GenerationBody
from longspan.server.grammar import grammar_of
from longspan.server.replies import Cursor, TextDelta, identity, usage
from longspan.server.text import Conversation, Text
from longspan.server.tools import ToolCall, ToolParser

_MAX_TOP_LOGPROBS = 20
_MAX_MESSAGES = 1 << 16  # a template takes about 10 us for each, and makes at least three tokens of it
_MAX_PARTS = 1 << 12  # parts of one message's content; clients send one for each file or quotation
_MAX_TOOLS = 1 << 10  # OpenAI's limit is 128
_MAX_FIELDS = 64  # fields of a message, of a template's options, of metadata; OpenAI's messages have six


class Message(BaseModel):
    """One turn; fields beyond these reach the template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=_MAX_PARTS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_long", f"holds more than {_MAX_FIELDS} fields")
        return value

    def rendered(self, place: str) -> dict[str, Any]:
        """The message as templates expect it: `content` is one string.

        `place` is the message's place in the body, for errors. Raises `RequestError` for parts that are not text.
        """
        fields = self.model_dump(exclude_none=True)
        if self.role == "developer":
            fields["role"] = "system"
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RequestError(f"{place}.content", shortened(part), "is not text", "send text parts only")
            fields["content"] = "".join(part["text"] for part in self.content)
        return {"content": "", **fields}


def _parse_arguments(place: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Replace the arguments of tool calls, which clients send as JSON text, by objects, which templates expect.

    Arguments that are not valid JSON stay text.
    """
    functions = [
        function
        for message in messages
        for call in _listed(message.get("tool_calls"))
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict)
        if isinstance(function.get("arguments"), str)
    ]
    # the body's strings were not counted when it was parsed, so the JSON in them has bounds of its own
    JsonBounds().check([function["arguments"].encode(errors="replace") for function in functions], place)
    for function in functions:
        with suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def conversation(messages: Sequence[Message], tools: Sequence[Tool] | None) -> Conversation:
    """Messages and tools as templates expect them. Raises `RequestError`."""
    rendered = [message.rendered(f"messages.{number}") for number, message in enumerate(messages)]
    _parse_arguments("messages.tool_calls", rendered)
    return rendered, [tool.model_dump(exclude_none=True) for tool in tools or ()]


class Function(Body):
    """A function a tool names."""

    model_config = ConfigDict(extra="ignore")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool the model may call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    function: Function


Messages = Annotated[list[Message], Field(fail_fast=True, max_length=_MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=_MAX_TOOLS)]
_Metadata = Annotated[dict[str, str], Field(max_length=_MAX_FIELDS)]
TemplateOptions = Annotated[dict[str, Any], Field(max_length=_MAX_FIELDS)]


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(GenerationBody):
    """The body of a chat completion."""

    messages: Messages = Field(min_length=1)
    max_tokens: int | None = Field(default=None, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, description="default: until the context is full")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="taken, not used")
    chat_template_kwargs: TemplateOptions | None = Field(default=None, description="not OpenAI's: for the template")
    return_token_ids: bool | None = Field(default=None, description="not OpenAI's: add token_ids to each choice")
    metadata: _Metadata | None = Field(default=None, description="taken, not used")
    store: bool | None = Field(default=None, description="taken, not used")
    reasoning_effort: str | None = Field(default=None, description="taken, not used")
    verbosity: str | None = Field(default=None, description="taken, not used")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=_MAX_FIELDS)] | None = None

    async def reply(self, text: Text, model: str, tool_format: str | None) -> ChatReply:
        """Tokenise the conversation and make the reply, which has no output yet. Raises `RequestError`."""
        forced = self._forced()
        if forced or self.response_format:
            params = await text.run_grammar(lambda: self._params(forced))
        else:
            params = self._params(None)
        tools = None if self.tool_choice == "none" or not self.tools else self.tools
        talk = partial(conversation, self.messages, tools)
        tokens = await text.chat(talk, self.chat_template_kwargs or {}, self.num_bytes)
        parse = tool_format if tools and forced is None else None
        return ChatReply(self, Job(tokens, params), text, model, parse, forced)

    def _params(self, forced: Function | None) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit == 0:
            raise RequestError("max_completion_tokens", 0, "leaves no room for an answer", "give at least 1")
        top = self.top_logprobs
        if top is not None and not (self.logprobs and 0 <= top <= _MAX_TOP_LOGPROBS):
            raise RequestError(
                "top_logprobs", top, f"must be in 0..{_MAX_TOP_LOGPROBS}, and needs logprobs", "set logprobs to true"
            )
        grammar = None if forced is None else grammar_of(forced.parameters or {"type": "object"})
        return self.sampling(limit, (top or 0) if self.logprobs else None, grammar)

    def _forced(self) -> Function | None:
        """The function that `tool_choice` requires a call of; None if a call is optional. Raises `RequestError`."""
        choice, known = self.tool_choice, {tool.function.name: tool.function for tool in self.tools or ()}
        if choice is None or choice in ("none", "auto"):
            return None
        if isinstance(choice, NamedTool):
            if choice.function.name not in known:
                raise RequestError(
                    "tool_choice.function.name", shortened(choice.function.name), "is not among the tools",
                    f"use one of {shortened(list(known))}" if known else "give tools",
                )  # fmt: skip
            return known[choice.function.name]
        if len(known) == 1:
            return next(iter(known.values()))
        raise RequestError(
            "tool_choice", choice, f"is supported with one tool, and there are {len(known)}", "name the tool to call"
        )


class ChatReply:
    """See `Reply`. Tool calls are parsed from the text by `tool_format`.

    If a function is `forced`, the whole text is the arguments of one call of it.
    """

    def __init__(
        self, body: ChatBody, job: Job, text: Text, model: str, tool_format: str | None, forced: Function | None
    ) -> None:
        self.jobs = [job]
        self.stream_options = body.usage_in_stream
        self._body = body
        self._text = text
        self._identity = identity("chatcmpl", "chat.completion", model)
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
        return {**self._identity, "choices": choices, "usage": usage(outputs)}

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

    def __init__(self, tool_format: str | None, forced: Function | None) -> None:
        self._parser = ToolParser(tool_format) if tool_format else None
        self._forced = forced
        self._made = 0

    def change(self, delta: TextDelta) -> dict[str, Any]:
        """The fields that a delta adds to the message: `content`, `tool_calls`, or neither."""
        if self._forced is not None:
            return {"tool_calls": [self._forced_call(self._forced.name, delta.text)]} if delta.text else {}
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
        """The finish reason: `tool_calls` in place of `stop` if the completion has made calls."""
        return "tool_calls" if reason == "stop" and self._made else reason

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._made += 1
        return {
            "index": self._made - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }  # fmt: skip

    def _forced_call(self, name: str, text: str) -> dict[str, Any]:
        """The chunk of a forced call: its name with the first piece of the arguments, afterwards arguments alone."""
        if self._made:
            return {"index": 0, "function": {"arguments": text}}
        return self._call(ToolCall(name, text))
