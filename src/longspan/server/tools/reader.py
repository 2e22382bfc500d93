"""A reader of incomplete text: a position in it, and generators that wait for more text.

It owns which text is held back; it must not know any format of calls.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Wait: TypeAlias = Generator[None, None, T]
"""A generator that yields whenever it needs more text, and returns a T."""

SPACE = re.compile(r"\s*")
BARE = re.compile(r"[\s\w:=,.+-]*")
"""The characters of JSON and Python literals, except brackets and strings."""
IN_STRING = MappingProxyType({quote: re.compile(rf"[^{quote}\\]*") for quote in "\"'"})


@dataclass(frozen=True)
class ToolCall:
    """One tool call."""

    # the function's name
    name: str
    # JSON text of an object, as OpenAI's protocol has it
    arguments: str


@dataclass(frozen=True)
class ParsedDelta:
    """The content and calls that more text has made certain."""

    # text for the user
    content: str = ""
    # complete calls
    calls: tuple[ToolCall, ...] = ()


class NoCall(Exception):
    """The text is not a call, or not a complete one."""


class Reader:
    """Text that is not yet known to be content or a call, and a position in it.

    Methods that pass text raise `NoCall` if the text is different from what they pass, or ends before it.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False
        self.taken = False
        self._content = ""
        self._calls: list[ToolCall] = []

    def pop(self) -> ParsedDelta:
        """The content released and the calls taken since the last call of `pop`."""
        delta = ParsedDelta(self._content, tuple(self._calls))
        self._content, self._calls = "", []
        return delta

    def release(self, length: int) -> None:
        """Release the first `length` characters as content. The position moves to the text after them."""
        self._content += self.text[:length]
        self.text, self.pos = self.text[length:], 0

    def take(self, *calls: ToolCall) -> None:
        """Take the text up to the position as `calls`; without any, as a part of the previous ones."""
        self._calls += calls
        self.text, self.pos, self.taken = self.text[self.pos :], 0, True

    def skip(self, pattern: re.Pattern[str]) -> Wait[str]:
        """Pass the text that matches and return it. `pattern` must be a repeated class of characters."""
        start = self.pos
        while True:
            if match := pattern.match(self.text, self.pos):
                self.pos = match.end()
            if self.pos < len(self.text):
                return self.text[start : self.pos]
            yield from self._more()

    def one_of(self, *words: str) -> Wait[str]:
        """Pass whitespace and one of `words`, and return the word; "" if none of them is next."""
        yield from self.skip(SPACE)
        while True:
            nexts = {word: self.text[self.pos : self.pos + len(word)] for word in words}
            for word, text in nexts.items():
                if text == word:
                    self.pos += len(word)
                    return word
            if not any(word.startswith(text) for word, text in nexts.items()):
                return ""
            yield from self._more()

    def expect(self, word: str) -> Wait[None]:
        """Pass whitespace and `word`."""
        if not (yield from self.one_of(word)):
            raise NoCall

    def brackets(self, quotes: str) -> Wait[str]:
        """Pass a pair of brackets, and return the brackets with their content.

        The content may hold further brackets, characters of literals (`BARE`), and strings in one of `quotes`. Brackets
        in strings do not count.
        """
        start, depth = self.pos, 0
        while True:
            yield from self.skip(BARE)
            character = yield from self._character()
            if character in quotes:
                yield from self._string(character)
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
            else:
                raise NoCall
            if depth == 0:
                return self.text[start : self.pos]

    def _string(self, quote: str) -> Wait[None]:
        while True:
            yield from self.skip(IN_STRING[quote])
            if (yield from self._character()) == quote:
                return
            # It was a backslash: the next character is part of the string.
            yield from self._character()

    def _character(self) -> Wait[str]:
        while self.pos == len(self.text):
            yield from self._more()
        self.pos += 1
        return self.text[self.pos - 1]

    def _more(self) -> Wait[None]:
        if self.ended:
            raise NoCall
        yield
