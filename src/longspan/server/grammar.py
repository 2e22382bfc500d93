"""Grammars for structured output, in the form of the grammar library.

It owns making and checking them before a request is queued; ranks compute the token masks.

A schema of a few kilobytes can take the library hours, and a call in a thread cannot be stopped. Each new grammar is
therefore made and tried in a process of its own. The process has a limit on CPU time, not on wall-clock time, so that
the result does not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from longspan.errors import RequestError
from longspan.server.errors import cut
from longspan.server.tools.forced import CALLS_BEGIN, CALLS_END, CALLS_SEPARATOR, call_begin

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"  # bounded, because a model may generate spaces without end
_CPU_SECONDS = 0.5  # bounds memory too; each rank takes about as long again, and other requests wait meanwhile
_PATIENCE_SECONDS = 60.0  # of a machine that has no processor free
_SHOWN = 200  # characters of the library's own words
_KEPT_BYTES = 64 << 10  # a longer schema is made again each time
_PROGRAM = str(Path(__file__).with_name("grammar_check.py"))


def grammar_of(schema: dict[str, Any] | bool, field: str = "response_format.json_schema") -> str:
    """The grammar of a JSON schema.

    Raises `RequestError`, which names `field`, for a schema that the library does not support. Takes a tenth of a
    second, half a second at most: call it in `Text.run_grammar`.
    """
    return _checked({"schema": json.dumps(schema), "whitespace": _WHITESPACE}, field)


def grammar_of_calls(arguments: Mapping[str, dict[str, Any]], several: bool, field: str) -> str:
    """The grammar of a list of calls: at least one, and no more unless `several`.

    `arguments` are JSON schemas by the functions' names; references in them stay within each. Raises `RequestError`.
    Call it in `Text.run_grammar`.
    """
    options = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    more = f"({_literal(CALLS_SEPARATOR)} call)*" if several else ""
    rules = [f"start: {_literal(CALLS_BEGIN)} call {more} {_literal(CALLS_END)}"]
    rules.append(f"call: {' | '.join(f'call_{number}' for number in range(len(arguments)))}")
    for number, (name, schema) in enumerate(arguments.items()):
        rules.append(f'call_{number}: {_literal(call_begin(name))} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, **options})}")
    return _checked({"lark": "\n".join(rules)}, field)


def _literal(text: str) -> str:
    """A text as the library's grammars write it."""
    return json.dumps(text)


def _checked(source: Mapping[str, str], field: str) -> str:
    """The grammar of a source, see `grammar_check.py`. Raises `RequestError`, which names `field`."""
    text = json.dumps(source)
    grammar, problem = _made(text) if len(text) <= _KEPT_BYTES else _make(text)
    if problem:
        shown = cut(problem, _SHOWN)  # the library repeats patterns whole
        raise RequestError(field, "{...}", f"cannot be followed ({shown})", "use JSON Schema's common parts")
    return grammar


def _make(source: str) -> tuple[str, str]:
    """The grammar, and why it cannot be followed."""
    command = [sys.executable, "-I", _PROGRAM, str(_CPU_SECONDS)]
    try:
        done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"it takes more than {_PATIENCE_SECONDS:g} seconds to prepare"
    if done.returncode == -signal.SIGPROF:
        return "", f"it takes more than {_CPU_SECONDS} seconds to prepare"
    if done.returncode:
        return "", "the library has failed"
    grammar, problem = json.loads(done.stdout)
    return grammar, problem


_made = lru_cache(256)(_make)
