"""The list of calls that an answer must be when `tool_choice` requires calls: how it is written, and a reader of it.

It owns this form, which a grammar enforces; the families' own forms are in `formats.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

CALLS_BEGIN, CALLS_SEPARATOR, CALLS_END = "[", ", ", "]"
_HEAD = re.compile(r'[\[,]\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
_MARKS = re.compile(r'["\\{}\[\]]')


def call_begin(name: str) -> str:
    """The text before the arguments of a call; `}` follows them."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call."""

    # the function's name, in the first piece of a call; else None
    name: str | None
    # the next piece of the arguments' JSON text
    arguments: str


class CallListReader:
    """Reads a list of calls from text in pieces. Arguments are returned as they come."""

    def __init__(self) -> None:
        self._text = ""  # what is not read yet
        self._inside = False  # whether the position is in the arguments of a call
        self._depth = 0  # open brackets of the arguments
        self._quoted = False  # whether the position is in a string

    def append(self, text: str) -> list[CallDelta]:
        """Add text; returns the pieces of calls in it."""
        self._text += text
        found: list[CallDelta] = []
        while self._text:
            name = None
            if not self._inside:
                head = _HEAD.search(self._text)
                if head is None:
                    break
                name, self._text = json.loads(head[1]), self._text[head.end() :]
                self._inside = True
            arguments = self._arguments()
            if name is not None or arguments:
                found.append(CallDelta(name, arguments))
            if self._inside:
                break
        return found

    def _arguments(self) -> str:
        """Pass the arguments up to their end, or to the end of the text."""
        position = 0
        while (mark := _MARKS.search(self._text, position)) is not None:
            position = mark.end()
            if mark[0] == "\\":
                if position == len(self._text):  # what it escapes is still to come
                    return self._pass(position - 1)
                position += 1
            elif mark[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if mark[0] in "{[" else -1
                if self._depth == 0:
                    self._inside = False
                    return self._pass(position)
        return self._pass(len(self._text))

    def _pass(self, length: int) -> str:
        passed, self._text = self._text[:length], self._text[length:]
        return passed
