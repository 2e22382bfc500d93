"""Grammars for structured output, in the form of the grammar library.

It owns making and checking them before a request is queued; ranks compute the token masks.
"""

from __future__ import annotations

import json
from typing import Any

from longspan.errors import RequestError

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"  # bounded, because a model may generate spaces without end


def grammar_of(schema: dict[str, Any] | bool) -> str:
    """The grammar of a JSON schema. Raises `RequestError` for a schema that the library does not support."""
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE}
        )
        problem = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise RequestError(
            "response_format.json_schema", "{...}", f"cannot be followed ({problem})", "use JSON Schema's common parts"
        )
    return grammar
