"""Time a batch of requests in an engine: time to first token, decode rate, placement of pages.

It owns the clock and the definition of what is counted; it must not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.cache.pages import PageRef
from longspan.clock import now
from longspan.engine.engine import Engine
from longspan.request import RequestOutput, SamplingParams

Watcher = Callable[[RequestOutput], None]
PrefillWatcher = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """The outputs and times of a batch. Seconds are wall-clock time."""

    # in the order of the prompts
    outputs: tuple[RequestOutput, ...]
    # pages of the first request before its last step, in order of positions
    pages: tuple[PageRef, ...]
    # from the start until the last request has its first token
    ttft_s: float
    # from then to the end
    decode_s: float
    # tokens generated in `decode_s`, of all requests
    decode_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second until the last request has its first token."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens generated per second after that moment; None if there were none."""
        return self.decode_tokens / self.decode_s if self.decode_tokens else None


class _Run:
    """The progress of one batch."""

    def __init__(self, engine: Engine, ids: Sequence[str]) -> None:
        self.engine = engine
        self.outputs: dict[str, RequestOutput] = {}
        self.waiting = set(ids)
        self.pages: list[PageRef] = []
        self._ids = list(ids)

    def step(self) -> list[RequestOutput]:
        """Run one engine step; returns the outputs of this batch that changed."""
        self.pages = self.engine.pages(self._ids[0]) or self.pages
        changed = [output for output in self.engine.step() if output.request_id in self._ids]
        for output in changed:
            self.outputs[output.request_id] = output
            self.waiting.discard(output.request_id)
        return changed

    @property
    def finished(self) -> bool:
        """Whether every request has finished."""
        return len(self.outputs) == len(self._ids) and all(output.finished for output in self.outputs.values())

    @property
    def tokens(self) -> int:
        """Tokens generated so far, of all completions."""
        return sum(len(c.token_ids) for output in self.outputs.values() for c in output.outputs)


def run_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_prefill: PrefillWatcher | None = None,
    on_output: Watcher | None = None,
) -> Measured:
    """Run the prompts together and time them. The engine should be idle.

    `on_prefill(done, total)` is called with the first prompt's progress, `on_output` with every output that changed. On
    an exception, such as an interrupt, the requests are aborted.
    """
    ids = [f"measured-{number}" for number in range(len(prompts))]
    started = now()
    try:
        for request_id, prompt in zip(ids, prompts, strict=True):
            engine.add_request(request_id, list(prompt), params)
        run = _Run(engine, ids)
        while run.waiting:
            _report(run.step(), on_output)
            if on_prefill and ids[0] in run.waiting:
                on_prefill(*engine.progress(ids[0]))
        first, tokens = now(), run.tokens
        while not run.finished:
            _report(run.step(), on_output)
        ended = now()
    except BaseException:
        for request_id in ids:
            engine.abort(request_id)
        raise
    outputs = tuple(run.outputs[request_id] for request_id in ids)
    return Measured(outputs, tuple(run.pages), first - started, ended - first, run.tokens - tokens)


def _report(changed: Sequence[RequestOutput], on_output: Watcher | None) -> None:
    for output in changed if on_output else ():
        on_output(output)  # type: ignore[misc]
