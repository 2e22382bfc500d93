"""Grammars for structured output, in the form of the grammar library.

It owns making and checking them before a request is queued; ranks compute the token masks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longspan.errors import RequestError
from longspan.server.tools.forced import CALLS_BEGIN, CALLS_END, CALLS_SEPARATOR, call_begin

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"  # bounded, because a model may generate spaces without end


def grammar_of(schema: dict[str, Any] | bool, field: str = "response_format.json_schema") -> str:
    """The grammar of a JSON schema.

    Raises `RequestError`, which names `field`, for a schema that the library does not support.
    """
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE}
        )
        return _checked(grammar, LLMatcher.validate_grammar(grammar), field)
    except ValueError as error:
        return _checked("", str(error), field)


def grammar_of_calls(arguments: Mapping[str, dict[str, Any]], several: bool, field: str) -> str:
    """The grammar of a list of calls: at least one, and no more unless `several`.

    `arguments` are JSON schemas by the functions' names; references in them stay within each. Raises `RequestError`.
    """
    from llguidance import LLMatcher

    options = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    more = f"({_literal(CALLS_SEPARATOR)} call)*" if several else ""
    rules = [f"start: {_literal(CALLS_BEGIN)} call {more} {_literal(CALLS_END)}"]
    rules.append(f"call: {' | '.join(f'call_{number}' for number in range(len(arguments)))}")
    for number, (name, schema) in enumerate(arguments.items()):
        rules.append(f'call_{number}: {_literal(call_begin(name))} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, **options})}")
    try:
        grammar: str = LLMatcher.grammar_from_lark("\n".join(rules))
        return _checked(grammar, LLMatcher.validate_grammar(grammar), field)
    except ValueError as error:
        return _checked("", str(error), field)


def _literal(text: str) -> str:
    """A text as the library's grammars write it."""
    return json.dumps(text)


def _checked(grammar: str, problem: str, field: str) -> str:
    if problem:
        raise RequestError(field, "{...}", f"cannot be followed ({problem})", "use JSON Schema's common parts")
    return grammar
