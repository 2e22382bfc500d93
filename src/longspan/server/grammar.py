"""Grammars for structured output, in the form of the grammar library.

It owns making and checking them before a request is queued; ranks compute the token masks.

A schema of a few kilobytes can take the library hours, and nothing ends a call in a thread. Each new schema is
therefore tried in a process with a limit on its CPU time: what a busy machine makes slow is not refused.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from longspan.errors import RequestError

_CPU_SECONDS = 0.5  # bounds memory too; each rank takes about as long again, and other requests wait meanwhile
_PATIENCE_SECONDS = 60.0  # of a machine that has no processor free
_KEPT_BYTES = 64 << 10  # a longer schema is made again each time
_PROGRAM = str(Path(__file__).with_name("grammar_check.py"))


def grammar_of(schema: dict[str, Any] | bool) -> str:
    """The grammar of a JSON schema. Raises `RequestError` for a schema that the library does not support.

    Takes a tenth of a second, half a second at most: call it in `Text.run_grammar`.
    """
    text = json.dumps(schema)
    grammar, problem = _made(text) if len(text) <= _KEPT_BYTES else _make(text)
    if problem:
        raise RequestError(
            "response_format.json_schema", "{...}", f"cannot be followed: {problem}", "use JSON Schema's common parts"
        )
    return grammar


def _make(schema: str) -> tuple[str, str]:
    """The grammar, and why it cannot be followed."""
    command = [sys.executable, "-I", _PROGRAM, str(_CPU_SECONDS)]
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"it takes more than {_PATIENCE_SECONDS:g} seconds to prepare"
    if done.returncode == -signal.SIGPROF:
        return "", f"it takes more than {_CPU_SECONDS} seconds to prepare"
    if done.returncode:
        return "", "the library has failed"
    grammar, problem = json.loads(done.stdout)
    return grammar, problem


_made = lru_cache(256)(_make)
