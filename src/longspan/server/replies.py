"""What both kinds of answer share: identity, usage, and what of an output was already sent.

It owns the bookkeeping of a stream; the shapes of completions and chats are theirs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longspan.request import CompletionOutput, RequestOutput, TokenLogprobs
from longspan.server.async_engine import Job
from longspan.server.fields import StreamOptions


@dataclass(frozen=True)
class TextDelta:
    """What a completion gained since it was last asked. `logprobs` are of `tokens`, None if not wanted."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str | None
    stop_reason: str | int | None
    with_ids: bool = False

    @property
    def worth_sending(self) -> bool:
        """Whether a client would see a difference."""
        return bool(self.text or self.finish_reason or (self.tokens and (self.logprobs or self.with_ids)))


class Cursor:
    """How much of one completion has been sent."""

    def __init__(self, output: CompletionOutput, with_ids: bool) -> None:
        self._output = output
        self._with_ids = with_ids
        self._text = 0
        self._tokens = 0
        self._ended = False

    def delta(self) -> TextDelta:
        """What is new, which counts as sent from now on."""
        output = self._output
        text, tokens = output.text[self._text :], tuple(output.token_ids[self._tokens :])
        logprobs = None if output.logprobs is None else tuple(output.logprobs[self._tokens :])
        reason = None if output.finish_reason is None or self._ended else output.finish_reason.value
        found = TextDelta(text, tokens, logprobs, reason, output.stop_reason, self._with_ids)
        if found.worth_sending:
            self._text, self._tokens, self._ended = len(output.text), len(output.token_ids), reason is not None
        return found


class Reply(Protocol):
    """An answer in the making."""

    jobs: list[Job]
    stream_options: StreamOptions

    def open(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Chunks of a stream before any token."""

    def chunks(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Chunks of a stream for outputs that changed."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer of a request that does not stream."""

    def envelope(self) -> dict[str, Any]:
        """Identity of every chunk."""


def identity(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Id, kind of object, time and model of an answer."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of all outputs together."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
