"""What answers to completions and chats share: id, usage, and the deltas of a stream.

It owns the position of a stream in its output; it must not know the formats of completions and chats.
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
from longspan.server.text import Text


@dataclass(frozen=True)
class TextDelta:
    """What a completion has gained since the previous delta."""

    # new text
    text: str
    # ids of new tokens
    tokens: tuple[int, ...]
    # one for each of `tokens`; None if they were not asked for
    logprobs: tuple[TokenLogprobs, ...] | None
    # set in the last delta
    finish_reason: str | None
    # the stop string or stop token that ended the completion
    stop_reason: str | int | None
    # whether the client gets the token ids
    with_ids: bool = False

    @property
    def worth_sending(self) -> bool:
        """Whether the delta holds anything that the client gets."""
        return bool(self.text or self.finish_reason or (self.tokens and (self.logprobs or self.with_ids)))


class Cursor:
    """The position up to which one completion has been sent."""

    def __init__(self, output: CompletionOutput, with_ids: bool) -> None:
        self._output = output
        self._with_ids = with_ids
        self._text = 0
        self._tokens = 0
        self._ended = False

    def delta(self) -> TextDelta:
        """The delta since the last call. If it is worth sending, the position moves to the end of it."""
        output = self._output
        text, tokens = output.text[self._text :], tuple(output.token_ids[self._tokens :])
        logprobs = None if output.logprobs is None else tuple(output.logprobs[self._tokens :])
        reason = None if output.finish_reason is None or self._ended else output.finish_reason.value
        found = TextDelta(text, tokens, logprobs, reason, output.stop_reason, self._with_ids)
        if found.worth_sending:
            self._text, self._tokens, self._ended = len(output.text), len(output.token_ids), reason is not None
        return found


class Reply(Protocol):
    """The answer to one request, made from the outputs of its jobs."""

    # the prompts to complete
    jobs: list[Job]
    # what a stream sends besides text
    stream_options: StreamOptions

    def open(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """The first chunks of a stream, before any token. Must be called before `chunks`."""

    def chunks(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Chunks of a stream, for outputs that changed."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def envelope(self) -> dict[str, Any]:
        """The fields that every chunk has: id, object, time and model."""


def identity(prefix: str, kind: str, model: str, request_id: str | None = None) -> dict[str, Any]:
    """Id, object, time and model of a new answer. Without a `request_id` of the client a new one is made."""
    name = request_id or uuid.uuid4().hex
    return {"id": f"{prefix}-{name}", "object": kind, "created": int(time.time()), "model": model}


def prompt_scores(output: RequestOutput, text: Text) -> list[dict[int, dict[str, Any]] | None]:
    """`prompt_logprobs` as vLLM returns it: a list with one entry for each token of the prompt.

    An entry has the prompt's token and the most likely tokens, by token id. The first token's entry is None. `rank`
    counts from 1; it is None for a prompt token that is not among the most likely ones.
    """
    found: list[dict[int, dict[str, Any]] | None] = []
    for token, row in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        if row is None:
            found.append(None)
            continue
        values = dict.fromkeys((token, *row.top_ids), row.sampled) | dict(zip(row.top_ids, row.top_values, strict=True))
        ranks = {other: place for place, other in enumerate(row.top_ids, 1)}
        found.append(
            {
                other: {"logprob": value, "rank": ranks.get(other), "decoded_token": text.token(other)}
                for other, value in values.items()
            }
        )
    return found


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage` object: the tokens of all outputs together."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
