"""Incremental detokenization of one completion, and the search for its stop strings.

It owns which text is final: incomplete characters and possible beginnings of stop strings are held back. It must not
know how tokens were chosen, nor what happens to a completion after a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from longspan.errors import RequestError
from longspan.request import SamplingParams

INCOMPLETE = "\ufffd"
"""U+FFFD: decoders return it for bytes that are not a complete character."""

MAX_PENDING = 16
"""The most tokens held back for a character to become complete."""

MAX_BYTES = 4
"""Bytes of the longest UTF-8 character, and so the most tokens that may belong to an incomplete one."""


class Tokenizer(Protocol):
    """The part of transformers' tokenizer interface that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`, with U+FFFD for bytes that do not form a character."""


class Detokenizer:
    """The text of one completion.

    `context` holds the last few tokens of the prompt. Their text is not returned. They are needed because SentencePiece
    decoders drop the space before the first token that they are given.

    The completion ends at the character that completes a stop string, however the text is divided into tokens. If
    several stop strings end at the same character, the longest counts. A stop string that ends within the first
    `params.min_tokens` tokens does not count.

    Raises:
        RequestError: `params.stop` is not empty and there is no tokenizer to find stop strings with.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, context: Sequence[int] = ()) -> None:
        if tokenizer is None and params.stop:
            raise RequestError(
                "stop", list(params.stop), "stop strings need a tokenizer and this model has none",
                "use stop_token_ids, or add tokenizer files to the model's folder",
            )  # fmt: skip
        self.stopped_by: str | None = None
        self._window = None if tokenizer is None else _Window(tokenizer, params.skip_special_tokens, context)
        self._stops = tuple(params.stop)
        self._include_stop = params.include_stop_str_in_output
        self._early = params.min_tokens  # tokens to come whose text ends no stop string
        self._held = ""  # text that may be the beginning of a stop string
        self._pieces: list[str] = []  # text returned so far

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def append(self, token_id: int) -> str:
        """Append a token and return the text that it makes final, which is often empty.

        Tokens after a stop string are ignored.
        """
        if self._window is None or self.stopped_by is not None:
            return ""
        self._early -= 1
        return self._release(self._window.append(token_id), last=False)

    def finish(self) -> str:
        """Return the text that was held back, as no more tokens will come. A second call returns ""."""
        if self._window is None or self.stopped_by is not None:
            return ""
        return self._release(self._window.rest(), last=True)

    def _release(self, new: str, last: bool) -> str:
        """Add decoded text; returns what is final. With `last` no more text will come."""
        # `_held` is the longest end of the text that a stop string begins with, so earlier text need not be searched.
        text = self._held + new
        found = None if self._early >= 0 else self._first_stop(text, len(self._held))
        if found is None:
            keep = 0 if last else self._possible_stop(text)
            end, self._held = len(text) - keep, text[len(text) - keep :]
        else:
            self.stopped_by, self._held = found[1], ""
            end = found[0] if self._include_stop else found[0] - len(found[1])
        self._pieces.append(text[:end])
        return text[:end]

    def _first_stop(self, text: str, after: int) -> tuple[int, str] | None:
        """The end of the first stop string in `text` that ends after `after` characters, and the string; else None."""
        starts = ((text.find(stop, max(0, after - len(stop) + 1)), stop) for stop in self._stops)
        ends = [(start + len(stop), stop) for start, stop in starts if start >= 0]
        return min(ends, key=lambda end: (end[0], -len(end[1])), default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class _Window:
    """The last few tokens, decoded again for every new one.

    The text of a token depends on its neighbours (spaces, bytes of one character). New text is therefore the difference
    between two decodings that start at the same token, as in text-generation-inference and vLLM. The window begins at
    the tokens whose text was returned last, so the work for a token does not grow with the output.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        # By default transformers may rewrite " ," as ",", which is not the model's text.
        if hasattr(tokenizer, "clean_up_tokenization_spaces"):
            self._options["clean_up_tokenization_spaces"] = False
        self._ids = list(context[-MAX_PENDING:])
        self._settled = len(self._ids)  # tokens at the start of the window whose text is complete and was returned
        self._released = len(self._decode())  # characters of the window's text that were returned

    def append(self, token_id: int) -> str:
        """Append a token and return the text that it makes final."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(INCOMPLETE):
            return self._advance_in_character(text)
        if len(text) <= self._released:
            # The token has no text (a skipped special token), so the window cannot start with it. Keep the old start.
            if self._num_pending > MAX_PENDING:
                self._ids.pop()
            return ""
        new = text[self._released :]
        del self._ids[: self._settled]
        self._settled, self._released = len(self._ids), len(self._decode())
        return new

    def rest(self) -> str:
        """The text of an incomplete character at the end."""
        text = self._decode()
        new = text[self._released :]
        self._released = len(text)
        return new

    def _advance_in_character(self, text: str) -> str:
        """Return the text before the incomplete character at the end of `text`.

        A token may hold the end of one character and the beginning of the next, so several windows in a row may end
        inside a character; and a model may generate bytes that never become one. After `MAX_PENDING` tokens everything
        but the last replacement character is final, and the window starts again with the last `MAX_BYTES` tokens.
        """
        final = len(text.rstrip(INCOMPLETE))
        overdue = self._num_pending > MAX_PENDING
        if overdue:
            final = len(text) - 1
        new = text[self._released : final]
        self._released = max(self._released, final)
        if overdue:
            del self._ids[:-MAX_BYTES]
            self._settled, self._released = 0, max(0, len(self._decode()) - 1)
        return new

    @property
    def _num_pending(self) -> int:
        return len(self._ids) - self._settled

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, **self._options) if self._ids else ""
