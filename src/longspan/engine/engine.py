"""The engine in one process: requests in, tokens and text out, one step at a time.

It owns the loop between the core, which computes tokens, and the output processor, which turns them into outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from longspan.cache.pages import PageRef
from longspan.config import EngineConfig
from longspan.engine.driver.build import build_core
from longspan.engine.driver.core import EngineStats
from longspan.engine.frontend.detokenizer import Tokenizer
from longspan.engine.frontend.output_processor import CoreCalls, OutputProcessor
from longspan.engine.setup import EngineSetup, resolve
from longspan.request import RequestOutput, SamplingParams
from longspan.scheduler.sequence import SequenceState


class Engine:
    """Continuous batching over an executor. Not thread-safe: one caller steps it.

    Raises `ConfigError` and `ModelError` when built, `RequestError` from `add_request`, `EngineError` from `step`.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None = None, setup: EngineSetup | None = None):
        self.setup = setup or resolve(config)
        self.config = self.setup.config
        self.core = build_core(self.setup)
        self.setup = self.core.setup  # now with what the ranks have measured
        self.scheduler, self.executor = self.core.scheduler, self.core.executor
        self._output_processor = OutputProcessor(self.setup, tokenizer)
        self._ended: list[RequestOutput] = []

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[SupportsIndex],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queue a request. Raises `RequestError` at once if it can never be served."""
        output = self._output_processor.add(request_id, prompt_token_ids, params, prompt)
        if output.finished:
            self._ended.append(output)
        self._carry_out()

    def abort(self, request_id: str) -> None:
        """End a request now. The next step can use its pages. Unknown ids are ignored."""
        output = self._output_processor.abort(request_id)
        if output is not None:
            self._ended.append(output)
        self._carry_out()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work to do or outputs to return."""
        return bool(len(self._output_processor) or self._ended or self.core.has_unfinished)

    def progress(self, request_id: str) -> tuple[int, int]:
        """For a progress bar: prompt tokens computed or in flight, and all prompt tokens, of the first completion."""
        sequence = self._first_sequence(request_id)
        return (min(sequence.computed, sequence.num_prompt), sequence.num_prompt) if sequence else (0, 0)

    def pages(self, request_id: str) -> list[PageRef]:
        """The pages that hold the context of a request's first completion now, in order of positions."""
        sequence = self._first_sequence(request_id)
        return list(sequence.table.pages) if sequence else []

    def step(self) -> list[RequestOutput]:
        """Run one step of the core. Returns the requests that changed; a finished one is not returned again."""
        ended, self._ended = self._ended, []
        changed = self._output_processor.take(self.core.step())
        self._carry_out()
        return [*ended, *changed]

    def stats(self) -> EngineStats:
        """Requests, pages and counters at this moment."""
        return self.core.stats()

    def shutdown(self) -> None:
        """End every rank. May be called more than once."""
        self.core.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _carry_out(self) -> None:
        calls, self._output_processor.core_calls = self._output_processor.core_calls, CoreCalls()
        for request in calls.start:
            self.core.add(request)
        for request_id in calls.finish:
            self.core.finish(request_id)

    def _first_sequence(self, request_id: str) -> SequenceState | None:
        first = self._output_processor.core_ids(request_id)[:1]
        return next((s for s in (*self.scheduler.running, *self.scheduler.waiting) if s.request_id in first), None)
