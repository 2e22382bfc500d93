"""Incremental parsing of tool calls in a model's output.

It owns which text is content and which is a call; it must not know which tools a request offers, nor how a call is sent
to the client.
"""

from __future__ import annotations

from contextlib import suppress

from longspan.config import require_choice
from longspan.server.tools.formats import FORMATS, ToolFormat, detect_format
from longspan.server.tools.reader import NoCall, ParsedDelta, Reader, ToolCall, Wait

__all__ = ["TOOL_FORMATS", "ParsedDelta", "ToolCall", "ToolParser", "detect_format"]

TOOL_FORMATS = tuple(FORMATS)


class ToolParser:
    """Parses the tool calls in one completion's text.

    Text is returned as content as soon as it cannot be the beginning of a call. Text that begins like a call and turns
    out not to be one, or is incomplete at the end, is content too. The result does not depend on how the text is
    divided into pieces.

    Raises:
        ConfigError: `format` is not one of `TOOL_FORMATS`.
    """

    def __init__(self, format: str) -> None:
        require_choice("tool_call_parser", format, TOOL_FORMATS)
        self._reader = Reader()
        self._steps = _read_all(self._reader, FORMATS[format])

    def append(self, text: str) -> ParsedDelta:
        """Add text; returns the content and the calls that it makes certain."""
        self._reader.text += text
        next(self._steps, None)
        return self._reader.pop()

    def finish(self) -> ParsedDelta:
        """Return what was held back, as no more text will come. A second call returns nothing."""
        self._reader.ended = True
        next(self._steps, None)
        return self._reader.pop()


def _read_all(reader: Reader, form: ToolFormat) -> Wait[None]:
    """Read a whole completion. Yields whenever it needs more text."""
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
    """Release text up to the beginning of a call; False if no call can follow."""
    while True:
        reader.release(form.find(reader.text))
        if reader.text.startswith(form.openers):
            return True
        if reader.ended or not any(opener.startswith(reader.text) for opener in form.openers):
            return False
        yield
