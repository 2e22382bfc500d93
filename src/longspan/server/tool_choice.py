"""`tools` and `tool_choice`: which tools a model is shown, and the grammar of calls that it must make.

It owns both fields and the form of required calls; `tools/` reads calls from the model's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from longspan.errors import RequestError
from longspan.server.errors import shortened
from longspan.server.fields import Body
from longspan.server.grammar import grammar_of, grammar_of_calls

_MAX_TOOLS = 1 << 10  # OpenAI's limit is 128


class Function(Body):
    """A function a tool names."""

    model_config = ConfigDict(extra="ignore")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of its arguments, which are an object."""
        return {"type": "object", **(self.parameters or {})}


class Tool(Body):
    """A tool the model may call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    function: Function


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=_MAX_TOOLS)]


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """The tool that must be called, or one that may be."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=_MAX_TOOLS)]


class AllowedToolChoice(Body):
    """OpenAI's wrapper of `AllowedTools`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind(value: Any) -> str:
    """The tag of a choice, or of an instance of one."""
    if isinstance(value, dict):
        return "allowed_tools" if value.get("type") == "allowed_tools" else "function"
    return str(getattr(value, "type", "word"))


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("function")]
    | Annotated[AllowedToolChoice, Tag("allowed_tools")],
    Discriminator(_kind),
]


@dataclass(frozen=True)
class ForcedCalls:
    """Calls that the whole answer consists of.

    The text of a `named` call is its arguments. Otherwise it is a list of calls as `grammar_of_calls` has them.
    """

    # what may be called
    functions: tuple[Function, ...]
    # whether the request names the one function to call
    named: bool
    # whether there may be several calls
    several: bool = True

    @property
    def finish_reason(self) -> str:
        """The reason that takes the place of `stop`: OpenAI has `stop` for a named tool."""
        return "stop" if self.named else "tool_calls"

    def grammar(self) -> str:
        """The grammar that enforces them. Raises `RequestError`."""
        if self.named:
            return grammar_of(self.functions[0].schema_of_arguments, "tools.function.parameters")
        schemas = {function.name: function.schema_of_arguments for function in self.functions}
        return grammar_of_calls(schemas, self.several, "tools.function.parameters")


def chosen_tools(
    choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None,
    tools: Sequence[Tool],
    several: bool,
) -> tuple[list[Tool], ForcedCalls | None]:
    """The tools that the model is shown, and the calls that it must make; None if a call is optional.

    `several` is whether there may be more than one call. Raises `RequestError`.
    """
    match choice:
        case None | "auto":
            return list(tools), None
        case "none":
            return [], None
        case "required":
            if not tools:
                raise RequestError("tool_choice", "required", "needs tools, and there are 0", "give tools")
            return list(tools), ForcedCalls(tuple(tool.function for tool in tools), False, several)
        case NamedTool():
            (named,) = _named([choice], tools, "tool_choice.function.name")
            return list(tools), ForcedCalls((named.function,), True)
        case AllowedToolChoice():
            allowed = _named(choice.allowed_tools.tools, tools, "tool_choice.allowed_tools.tools")
            return chosen_tools(choice.allowed_tools.mode, allowed, several)


def _named(names: Sequence[NamedTool], tools: Sequence[Tool], field: str) -> list[Tool]:
    """The tools of these names, each once. Raises `RequestError` for a name that no tool has."""
    known = {tool.function.name: tool for tool in tools}
    found: dict[str, Tool] = {}
    for one in names:
        name = one.function.name
        if name not in known:
            remedy = f"use one of {shortened(list(known))}" if known else "give tools"
            raise RequestError(field, shortened(name), "is not among the tools", remedy)
        found[name] = known[name]
    return list(found.values())
