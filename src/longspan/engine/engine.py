"""The engine: requests in, tokens and text out, one step at a time.

It owns the way between a core and its requests within one process; how tokens come to be is the core's, what users are
owed the tracker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from longspan.cache.pages import PageRef
from longspan.config import EngineConfig
from longspan.engine.driver.build import build_core
from longspan.engine.driver.core import EngineStats
from longspan.engine.frontend.detokenizer import Tokenizer
from longspan.engine.frontend.output_processor import Orders, OutputProcessor
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
        """End a request now; its pages are free for the next step. Unknown ids are ignored."""
        output = self._output_processor.abort(request_id)
        if output is not None:
            self._ended.append(output)
        self._carry_out()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work or outputs to give."""
        return bool(len(self._output_processor) or self._ended or self.core.has_unfinished)

    def progress(self, request_id: str) -> tuple[int, int]:
        """(prompt tokens computed or in flight, prompt tokens) of a request's first completion: for a progress bar."""
        sequence = self._first_sequence(request_id)
        return (min(sequence.computed, sequence.num_prompt), sequence.num_prompt) if sequence else (0, 0)

    def pages(self, request_id: str) -> list[PageRef]:
        """Where the context of a request's first completion lives now, in position order."""
        sequence = self._first_sequence(request_id)
        return list(sequence.table.pages) if sequence else []

    def step(self) -> list[RequestOutput]:
        """One step of the core. Returns the requests that changed, finished ones for the last time."""
        ended, self._ended = self._ended, []
        changed = self._output_processor.take(self.core.step())
        self._carry_out()
        return [*ended, *changed]

    def stats(self) -> EngineStats:
        """What is in use and what has travelled so far."""
        return self.core.stats()

    def shutdown(self) -> None:
        """End every rank; safe to call again."""
        self.core.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _carry_out(self) -> None:
        orders, self._output_processor.orders = self._output_processor.orders, Orders()
        for request in orders.start:
            self.core.add(request)
        for request_id in orders.finish:
            self.core.finish(request_id)

    def _first_sequence(self, request_id: str) -> SequenceState | None:
        first = self._output_processor.core_ids(request_id)[:1]
        return next((s for s in (*self.scheduler.running, *self.scheduler.waiting) if s.request_id in first), None)
