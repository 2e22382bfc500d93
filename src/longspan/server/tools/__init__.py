"""Finds the tool calls a model writes in its text, piece by piece as the text comes.

It owns what is content and what is a call; it must not know which tools a request offers, nor how a call is
sent to the client.
"""

from __future__ import annotations

from contextlib import suppress

from longspan.config import require_choice
from longspan.server.tools.formats import FORMATS, ToolFormat, detect_format
from longspan.server.tools.reader import NoCall, ParsedDelta, Reader, ToolCall, Wait

__all__ = ["TOOL_FORMATS", "ParsedDelta", "ToolCall", "ToolParser", "detect_format"]

TOOL_FORMATS = tuple(FORMATS)


class ToolParser:
    """The calls in one completion's text.

    Text is content as soon as it cannot begin a call. What begins like a call and turns out to be none, or is
    cut off, is content too, unchanged. How the text is cut into pieces makes no difference to the whole.

    Raises:
        ConfigError: `format` is none of `TOOL_FORMATS`.
    """

    def __init__(self, format: str) -> None:
        require_choice("tool_call_parser", format, TOOL_FORMATS)
        self._reader = Reader()
        self._steps = _read_all(self._reader, FORMATS[format])

    def append(self, text: str) -> ParsedDelta:
        """Take more text; returns what became certain by it."""
        self._reader.text += text
        next(self._steps, None)
        return self._reader.pop()

    def finish(self) -> ParsedDelta:
        """No more text will come: returns what was held back. A second call returns nothing."""
        self._reader.ended = True
        next(self._steps, None)
        return self._reader.pop()


def _read_all(reader: Reader, form: ToolFormat) -> Wait[None]:
    """Reads a whole completion; yields whenever it needs more text."""
    while (yield from _find_call(reader, form)):
        reader.taken = False
        with suppress(NoCall):
            yield from form.read(reader)
        reader.release(0 if reader.taken else 1)
        if form.at_start:
            break
    while not reader.ended:
        reader.release(len(reader.text))
        yield
    reader.release(len(reader.text))


def _find_call(reader: Reader, form: ToolFormat) -> Wait[bool]:
    """Releases text up to where a call begins; False if none will."""
    while True:
        reader.release(form.find(reader.text))
        if reader.text.startswith(form.openers):
            return True
        if reader.ended or not any(opener.startswith(reader.text) for opener in form.openers):
            return False
        yield
