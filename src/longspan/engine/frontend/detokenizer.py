"""Turns one completion's token ids into text as they come, and finds the stop strings in it.

It owns which text is final: characters and stop strings that are still incomplete are held back. It
must not know how the tokens were chosen, or what becomes of a completion that has been stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from longspan.errors import RequestError
from longspan.request import SamplingParams

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""

MAX_PENDING = 16
"""Tokens that may wait for a character to end. A character has at most 4 bytes, so more are no character."""

MAX_BYTES = 4
"""Bytes of the longest UTF-8 character, so the tokens that may still belong to an incomplete one."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers and wrappers around others have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`, with U+FFFD for bytes that form no character."""


class Detokenizer:
    """The text of one completion.

    `context` holds tokens before the first one appended (the prompt's last few), whose text is not
    released: decoders of the SentencePiece family drop the space before the first token they are given.

    The completion ends where the first stop string is complete, read character by character, so how text
    falls into tokens does not matter; of several complete at the same character the longest counts.

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
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text released so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that became final by it, often "".

        Once a stop string was found, tokens are ignored.
        """
        if self._window is None or self.stopped_by is not None:
            return ""
        return self._release(self._window.append(token_id), last=False)

    def finish(self) -> str:
        """No more tokens will come: returns the text that was held back. A second call returns ""."""
        if self._window is None or self.stopped_by is not None:
            return ""
        return self._release(self._window.rest(), last=True)

    def _release(self, new: str, last: bool) -> str:
        # Whatever a stop string could still begin with is in `_held`, so earlier text is never read again.
        text = self._held + new
        found = self._first_stop(text)
        if found is None:
            keep = 0 if last else self._possible_stop(text)
            end, self._held = len(text) - keep, text[len(text) - keep :]
        else:
            self.stopped_by, self._held = found[1], ""
            end = found[0] if self._include_stop else found[0] - len(found[1])
        self._pieces.append(text[:end])
        return text[:end]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where in `text` the first complete stop string ends, and which it is."""
        starts = ((text.find(stop), stop) for stop in self._stops)
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

    Text depends on the neighbours of a token (spaces, bytes of one character), so new text is the
    difference between two decodings that start at the same token, as in text-generation-inference and
    vLLM. The window starts one release before the new tokens, hence work does not grow with the output.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        # transformers' own default may rewrite " ," as ",": text that is not what the model said.
        if hasattr(tokenizer, "clean_up_tokenization_spaces"):
            self._options["clean_up_tokenization_spaces"] = False
        self._ids = list(context[-MAX_PENDING:])
        self._settled = len(self._ids)
        self._released = len(self._decode())

    def append(self, token_id: int) -> str:
        """The text that became final by `token_id`."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(INCOMPLETE):
            return self._advance_in_character(text)
        if len(text) <= self._released:
            # A token without text (a skipped special one) is no context to start a window with.
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
        """Release what precedes the incomplete end of `text`.

        Tokens may hold the end of one character and the start of the next, so a window may end inside
        a character for long, and a model may write bytes that never become one. After `MAX_PENDING`
        tokens all but the last replacement character is final, and the window restarts inside the text.
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
