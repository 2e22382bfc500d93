"""Drafts without a draft model (prompt lookup decoding; Saxena 2023).

A draft is what followed the last tokens where they occurred earlier in the request. This module owns the search in one
request's tokens; it must not know whether a draft is accepted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_NGRAMS = (3, 2)  # numbers of last tokens that are searched for, in this order
_WIDTH = array("I").itemsize  # bytes of a token


class PromptLookup:
    """The tokens of one request as bytes, so that `bytearray.rfind` can search them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow `tokens`; these must begin with the `tokens` of the last call."""
        self._bytes += array("I", tokens[len(self._bytes) // _WIDTH :]).tobytes()
        for length in _NGRAMS:
            after = self._find(length)
            if after is not None:
                return list(tokens[after : after + count])
        return []

    def _find(self, length: int) -> int | None:
        """The index after the latest earlier occurrence of the last `length` tokens; None if there is none."""
        pattern = self._bytes[-length * _WIDTH :]
        end = len(self._bytes) - _WIDTH
        while len(pattern) <= end:
            found = self._bytes.rfind(pattern, 0, end)
            if found < 0:
                return None
            if found % _WIDTH == 0:
                return found // _WIDTH + length
            end = found + len(pattern) - 1  # not at a token's first byte: search on before it
        return None
