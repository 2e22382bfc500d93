"""One completion of a request, as the user gets it: tokens, text and finish reason.

It owns the end by a stop string, and which tokens become text. It must not know about scheduling, nor which tokens end
a completion.
"""

from __future__ import annotations

from longspan.engine.frontend.detokenizer import Detokenizer
from longspan.request import CompletionOutput, FinishReason, SampledToken, SamplingParams, TokenOutput


class Completion:
    """Collects tokens until the core or a stop string ends the completion.

    `request_id` is its id in the core and on ranks. A stop token is part of `token_ids` but not of `text`.
    """

    def __init__(
        self, request_id: str, index: int, params: SamplingParams, seed: int, detokenizer: Detokenizer
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.seed = seed
        self.output = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
        self._params = params
        self._detokenizer = detokenizer

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.output.finish_reason is not None

    def take(self, outputs: TokenOutput) -> None:
        """Append the tokens of one step. Tokens after a stop string are dropped."""
        if outputs.finish_reason is FinishReason.ERROR:
            self.end(FinishReason.ERROR, outputs.error)
            return
        if not outputs.tokens:
            return
        if self._params.max_tokens == 0:  # only prompt log-probabilities are wanted, which come with the first token
            self.end(FinishReason.LENGTH)
            return
        *before, last = outputs.tokens
        for token in before:
            self._append(token)
            if self.finished:
                return
        stopped = outputs.finish_reason is FinishReason.STOP
        stop_id = stopped and last.token_id in self._params.stop_token_ids
        self._append(last, hidden=stopped and not (stop_id and self._params.include_stop_str_in_output))
        if outputs.finish_reason is not None and not self.finished:
            self.end(outputs.finish_reason, last.token_id if stop_id else None)

    def _append(self, token: SampledToken, hidden: bool = False) -> None:
        """Append a token, and its text unless it is hidden. Ends the completion at a stop string."""
        output = self.output
        output.token_ids.append(token.token_id)
        if output.logprobs is not None and token.logprobs is not None:
            output.logprobs.append(token.logprobs)
        if not hidden:
            output.text += self._detokenizer.append(token.token_id)
        if self._detokenizer.stopped_by is not None:
            self.end(FinishReason.STOP, self._detokenizer.stopped_by)

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End the completion and append the text that the detokenizer held back."""
        self.output.text += self._detokenizer.finish()
        self.output.finish_reason = reason
        self.output.stop_reason = stop_reason
