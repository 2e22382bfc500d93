"""Reads text that is still coming: a position in it, and steps that wait for more where they must.

It owns what is held back of the text; it must not know any format of calls.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Wait: TypeAlias = Generator[None, None, T]
"""A step of reading: yields whenever it needs more text than there is, and returns a T."""

SPACE = re.compile(r"\s*")
BARE = re.compile(r"[\s\w:=,.+-]*")
"""What JSON and Python literals consist of, apart from brackets and strings."""
IN_STRING = MappingProxyType({quote: re.compile(rf"[^{quote}\\]*") for quote in "\"'"})


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is the JSON text of an object, as OpenAI's protocol sends it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedDelta:
    """What became certain: text for the user, and calls that are complete."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class NoCall(Exception):
    """What was read is no call, or not a whole one."""


class Reader:
    """The text that is neither content nor part of a call yet, and a position in it.

    The methods that pass text raise `NoCall` where it is not what they pass, or ends too early.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False
        self.taken = False
        self._content = ""
        self._calls: list[ToolCall] = []

    def pop(self) -> ParsedDelta:
        """What was released and taken since the last time."""
        delta = ParsedDelta(self._content, tuple(self._calls))
        self._content, self._calls = "", []
        return delta

    def release(self, length: int) -> None:
        """The first `length` characters are content; reading starts again behind them."""
        self._content += self.text[:length]
        self.text, self.pos = self.text[length:], 0

    def take(self, *calls: ToolCall) -> None:
        """The text up to here is `calls`, or what goes with those before."""
        self._calls += calls
        self.text, self.pos, self.taken = self.text[self.pos :], 0, True

    def skip(self, pattern: re.Pattern[str]) -> Wait[str]:
        """Passes what matches and returns it; `pattern` is one class of characters, any number of times."""
        start = self.pos
        while True:
            if match := pattern.match(self.text, self.pos):
                self.pos = match.end()
            if self.pos < len(self.text):
                return self.text[start : self.pos]
            yield from self._more()

    def one_of(self, *words: str) -> Wait[str]:
        """Passes whitespace and one of `words`, and returns the word; "" if none of them is next."""
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
        """Passes whitespace and `word`."""
        if not (yield from self.one_of(word)):
            raise NoCall

    def brackets(self, quotes: str) -> Wait[str]:
        """Passes the brackets that are next, and returns them with what they enclose. Those in strings do not count.

        Only the characters of literals may stand between them, and strings between `quotes`.
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
            # After a backslash any character is part of the string.
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
