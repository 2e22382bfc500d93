"""Drafts without a draft model: what followed the last tokens when they came before (prompt lookup decoding).

It owns the search in one request's tokens; it must not know whether a draft proves right. Source: Saxena, Prompt
Lookup Decoding (2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_NGRAMS = (3, 2)  # tokens that must match, the longest first
_WIDTH = array("I").itemsize


class PromptLookup:
    """The tokens of one request as bytes, in which a search runs at the speed of memory."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow `tokens`, which begin as they did at the last call."""
        self._bytes += array("I", tokens[len(self._bytes) // _WIDTH :]).tobytes()
        for length in _NGRAMS:
            after = self._find(length)
            if after is not None:
                return list(tokens[after : after + count])
        return []

    def _find(self, length: int) -> int | None:
        """Where the latest earlier occurrence of the last `length` tokens ends."""
        pattern = self._bytes[-length * _WIDTH :]
        end = len(self._bytes) - _WIDTH
        while len(pattern) <= end:
            found = self._bytes.rfind(pattern, 0, end)
            if found < 0:
                return None
            if found % _WIDTH == 0:
                return found // _WIDTH + length
            end = found + len(pattern) - 1
        return None
