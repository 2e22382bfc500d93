"""Conversations: messages as clients send them, as chat templates expect them, and the template's options.

It owns these fields; `text.py` applies the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from longspan.errors import RequestError
from longspan.server.bodies import JsonBounds
from longspan.server.errors import shortened
from longspan.server.fields import Body
from longspan.server.text import RESERVED_OPTIONS, Conversation
from longspan.server.tool_choice import Tool

_MAX_MESSAGES = 1 << 16  # a template takes about 10 us for each, and makes at least three tokens of it
_MAX_PARTS = 1 << 12  # parts of one message's content; clients send one for each file or quotation
MAX_FIELDS = 64  # fields of a message, of a template's options, of metadata; OpenAI's messages have six
_MAX_DOCUMENTS = 1 << 10


class Message(BaseModel):
    """One turn; fields beyond these reach the template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=_MAX_PARTS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_long", f"holds more than {MAX_FIELDS} fields")
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


Messages = Annotated[list[Message], Field(fail_fast=True, max_length=_MAX_MESSAGES)]
TemplateOptions = Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)]
_Documents = Annotated[list[dict[str, str]], Field(fail_fast=True, max_length=_MAX_DOCUMENTS)]


class TemplateFields(Body):
    """How the chat template is applied. None of these is OpenAI's; names and meanings are vLLM's."""

    add_generation_prompt: bool | None = Field(
        default=None,
        description="end the prompt with the beginning of an answer; default: unless the last is continued",
    )
    continue_final_message: bool | None = Field(
        default=None, description="leave the last message open, so that the answer continues it"
    )
    documents: _Documents | None = Field(default=None, description="texts for templates that use them")
    chat_template: str | None = Field(
        default=None, description="a Jinja template in place of the model's, if --trust-request-chat-template allows it"
    )
    chat_template_kwargs: TemplateOptions | None = Field(default=None, description="further values for the template")

    def template_options(self, trusted: bool) -> dict[str, Any]:
        """The arguments for rendering the chat template.

        Raises `RequestError` if they are invalid, or if the request has its own template and `trusted` is False.
        """
        if self.chat_template is not None and not trusted:
            remedy = "leave it out, or start the server with --trust-request-chat-template"
            raise RequestError("chat_template", shortened(self.chat_template), "is not taken from requests", remedy)
        for name in self.chat_template_kwargs or ():
            if name in RESERVED_OPTIONS:
                raise RequestError(f"chat_template_kwargs.{name}", "...", "is not the template's own", "leave it out")
        goes_on = bool(self.continue_final_message)
        if goes_on and self.add_generation_prompt:
            problem = "excludes continue_final_message, which leaves no room for it"
            raise RequestError("add_generation_prompt", True, problem, "give one of the two")
        options: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        for name in ("add_generation_prompt", "documents", "chat_template"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return {**options, **(self.chat_template_kwargs or {})}
