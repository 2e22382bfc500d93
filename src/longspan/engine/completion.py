"""One completion of a request: its tokens, text and end.

It owns the stop conditions; it must not know about scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.engine.detokenizer import Detokenizer, Tokenizer
from longspan.request import CompletionOutput, FinishReason, SampledToken, SamplingParams


class Completion:
    """Collects sampled tokens until a stop token, a stop string or `max_tokens` ends them.

    `number` identifies it to the scheduler. The token that stops is part of `token_ids`, not of `text`.
    """

    def __init__(
        self,
        number: int,
        index: int,
        params: SamplingParams,
        max_tokens: int,
        seed: int,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        context: Sequence[int],
    ) -> None:
        self.number = number
        self.index = index
        self.seed = seed
        self.output = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
        self._params = params
        self._max_tokens = max_tokens
        self._eos = () if params.ignore_eos else eos_token_ids
        self._detokenizer = Detokenizer(tokenizer, params, context=context)

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.output.finish_reason is not None

    def append(self, token: SampledToken) -> None:
        """Take the next token."""
        output = self.output
        output.token_ids.append(token.token_id)
        if output.logprobs is not None and token.logprobs is not None:
            output.logprobs.append(token.logprobs)
        stop_id = token.token_id in self._params.stop_token_ids
        is_eos = token.token_id in self._eos
        if not (stop_id or is_eos) or (stop_id and self._params.include_stop_str_in_output):
            output.text += self._detokenizer.append(token.token_id)
        if self._detokenizer.stopped_by is not None:
            self.end(FinishReason.STOP, self._detokenizer.stopped_by)
        elif stop_id or is_eos:
            self.end(FinishReason.STOP, token.token_id if stop_id else None)
        elif len(output.token_ids) >= self._max_tokens:
            self.end(FinishReason.LENGTH)

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End it, releasing text that was held back."""
        self.output.text += self._detokenizer.finish()
        self.output.finish_reason = reason
        self.output.stop_reason = stop_reason
