"""The formats in which models write tool calls, and how to detect one from a chat template.

It owns the marks and the syntax of the formats; it must not know how text is held back or released.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from longspan.server.tools.reader import SPACE, NoCall, Reader, ToolCall, Wait

NAME = re.compile(r"[\w.-]*")
PYTHON_NAME = re.compile(r"\w*")

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass(frozen=True)
class ToolFormat:
    """One format of tool calls."""

    # a call begins with one of these
    openers: tuple[str, ...]
    # starts at an opener and takes calls from the reader until the text is not a call, then returns or raises `NoCall`;
    # text that it passed and did not take is content
    read: Callable[[Reader], Wait[None]]
    # whether calls occur at the beginning of a completion only
    at_start: bool = False

    def find(self, text: str) -> int:
        """The index in `text` of an opener, or of an incomplete one at the end; the length of `text` without one."""
        if self.at_start:
            return len(text) - len(text.lstrip())
        starts = [start for opener in self.openers if (start := text.find(opener)) >= 0]
        if starts:
            return min(starts)
        longest = max(map(len, self.openers))
        tails = range(max(0, len(text) - longest), len(text))
        return next((i for i in tails if any(o.startswith(text[i:]) for o in self.openers)), len(text))


def detect_format(chat_template: str | None) -> str | None:
    """The format whose marks occur in `chat_template`; None if there are none or the format is not supported."""
    template = chat_template or ""
    # These formats (Qwen3-Coder, GLM, Functionary) share a mark with one below, but their syntax differs.
    if "<function=" in template or "<arg_key>" in template:
        return None
    is_llama = "<|start_header_id|>" in template or "<|header_start|>" in template
    marks = {
        "hermes": "<tool_call>" in template,
        "mistral": "[TOOL_CALLS]" in template,
        "deepseek_v3": CALLS_BEGIN in template,
        "pythonic": "[func_name1(" in template,
        "llama3_json": "<|python_tag|>" in template or (is_llama and '"parameters"' in template),
    }
    return next((name for name, found in marks.items() if found), None)


def _hermes(reader: Reader) -> Wait[None]:
    while True:
        yield from reader.expect("<tool_call>")
        fields = yield from _json_object(reader)
        yield from reader.expect("</tool_call>")
        reader.take(_named_call(fields))


def _mistral(reader: Reader) -> Wait[None]:
    while True:
        yield from reader.expect("[TOOL_CALLS]")
        if (yield from reader.one_of("[")):
            yield from _mistral_list(reader)
        else:
            name = yield from reader.skip(NAME)
            if (yield from reader.one_of("[CALL_ID]")):
                yield from reader.skip(NAME)
            yield from reader.expect("[ARGS]")
            reader.take(_call(name, (yield from _json_object(reader))))


def _mistral_list(reader: Reader) -> Wait[None]:
    mark = ","
    while mark == ",":
        reader.take(_named_call((yield from _json_object(reader))))
        mark = yield from reader.one_of(",", "]")
    if mark:
        reader.take()


def _deepseek_v3(reader: Reader) -> Wait[None]:
    mark = yield from reader.one_of(CALLS_BEGIN, CALL_BEGIN)
    if mark == CALLS_BEGIN:
        yield from reader.expect(CALL_BEGIN)
        mark = CALL_BEGIN
    while mark == CALL_BEGIN:
        # V3 writes function<sep>NAME and arguments in a code fence, V3.1 NAME<sep> and arguments without one.
        before = yield from reader.skip(NAME)
        yield from reader.expect(CALL_SEP)
        after = yield from reader.skip(NAME)
        if after:
            yield from reader.expect("```json")
        arguments = yield from _json_object(reader)
        if after:
            yield from reader.expect("```")
        yield from reader.expect(CALL_END)
        reader.take(_call(after or before, arguments))
        mark = yield from reader.one_of(CALL_BEGIN, CALLS_END)
    if mark == CALLS_END:
        reader.take()


def _llama3_json(reader: Reader) -> Wait[None]:
    yield from reader.one_of("<|python_tag|>")
    while True:
        fields = yield from _json_object(reader)
        # An object without arguments is more likely to be an answer in JSON than a call.
        if not fields.keys() & {"parameters", "arguments"}:
            raise NoCall
        reader.take(_named_call(fields))
        yield from reader.one_of(";")


def _pythonic(reader: Reader) -> Wait[None]:
    marked = yield from reader.one_of("<|python_start|>")
    yield from reader.expect("[")
    start = reader.pos - 1
    # Check that a call follows, so that text in brackets is not held back until the closing bracket.
    yield from reader.skip(SPACE)
    yield from reader.skip(PYTHON_NAME)
    yield from reader.expect("(")
    reader.pos = start
    reader.take(*_python_calls((yield from reader.brackets("\"'"))))
    if marked and (yield from reader.one_of("<|python_end|>")):
        reader.take()


FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        "hermes": ToolFormat(("<tool_call>",), _hermes),
        "llama3_json": ToolFormat(("{", "<|python_tag|>"), _llama3_json, at_start=True),
        "mistral": ToolFormat(("[TOOL_CALLS]",), _mistral),
        "deepseek_v3": ToolFormat((CALLS_BEGIN, CALL_BEGIN), _deepseek_v3),
        "pythonic": ToolFormat(("[", "<|python_start|>"), _pythonic, at_start=True),
    }
)


def _json_object(reader: Reader) -> Wait[Mapping[str, Any]]:
    """Pass whitespace and a JSON object, and return the object."""
    yield from reader.expect("{")
    start = reader.pos - 1
    # Check the first character, so that text in braces is not held back until the closing brace.
    if not (yield from reader.one_of('"', "}")):
        raise NoCall
    reader.pos = start
    text = yield from reader.brackets('"')
    # Not strict: models write raw newlines in strings.
    return _parse_object(text, strict=False)


def _parse_object(text: str, strict: bool) -> dict[str, Any]:
    try:
        value = json.loads(text, strict=strict, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise NoCall from None
    if not isinstance(value, dict):
        raise NoCall
    return value


def _no_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities, which Python's parser accepts and JSON does not have."""
    raise ValueError(name)


def _named_call(fields: Mapping[str, Any]) -> ToolCall:
    """The call that an object describes. Models use both `arguments` and `parameters` for the arguments."""
    arguments = fields.get("arguments", fields.get("parameters"))
    return _call(fields.get("name"), {} if arguments is None else arguments)


def _call(name: object, arguments: object) -> ToolCall:
    if not isinstance(name, str) or not name:
        raise NoCall
    if isinstance(arguments, str):
        _parse_object(arguments, strict=True)
        text = arguments
    elif isinstance(arguments, dict):
        text = _dumped(arguments)
    else:
        raise NoCall
    try:
        # An escape may give a lone surrogate, which cannot be encoded in a response.
        (name + text).encode()
    except UnicodeEncodeError:
        raise NoCall from None
    return ToolCall(name, text)


def _dumped(arguments: dict[str, Any]) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise NoCall from None


def _python_calls(text: str) -> list[ToolCall]:
    """The calls in a Python list of calls. The text is parsed, not evaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            listed = ast.parse(text, mode="eval").body
        if not isinstance(listed, ast.List):
            raise NoCall
        return [_python_call(node) for node in listed.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoCall from None


def _python_call(node: ast.expr) -> ToolCall:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            return _call(name, {word.arg: _literal(word.value) for word in keywords})
    raise NoCall


def _literal(node: ast.expr | None) -> object:
    """The value of a Python literal that JSON can express. JSON's `true`, `false` and `null` are accepted too."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id="true" | "false" | "null" as word):
            return json.loads(word)
    raise NoCall
