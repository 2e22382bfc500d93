"""The Python interface for offline inference: `LLM`.

It owns tokenising, batching and streaming; everything else belongs to the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any, Unpack

from longspan.attention.backends import AttentionBackend
from longspan.attention.schedules import Schedule
from longspan.config import EngineConfig, EngineOptions
from longspan.config.option import lists_options
from longspan.engine.driver.core import EngineStats
from longspan.engine.engine import Engine
from longspan.engine.extensions import NONE_ADDED, Extensions
from longspan.engine.setup import resolve
from longspan.errors import RequestError
from longspan.models.registry import Family, family_of
from longspan.request import RequestOutput, SamplingParams
from longspan.weights.tokenizer import check_template, load_tokenizer

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

Prompt = str | Sequence[int]


class LLM:
    """A loaded model that completes prompts.

    A prompt is text or token ids; text needs a tokenizer beside the weights. Use an `LLM` in a `with` block, or call
    `shutdown` to end its ranks. `help(LLM.__init__)` lists the options, which have the names of the command line's.

    A step that takes longer than `step_timeout` raises `StepTimeout` and ends the ranks. Ranks that are threads
    (`executor="threads"`) cannot be ended: a rank that hangs stays until the process ends.

    `schedules` (`longspan.attention.schedules`), `families` (each a module or a `longspan.models.registry.Family`) and
    `backends` (`longspan.attention.backends`) are added to the built-in ones. They require `executor="threads"`.

    >>> with LLM("smollm2", prefill_context_parallel_size=2) as llm:
    ...     print(llm.generate("The capital of France is")[0].outputs[0].text)
    """

    @lists_options(EngineConfig, EngineOptions)
    def __init__(
        self,
        model: str,
        *,
        schedules: Sequence[Schedule] = (),
        families: Sequence[Family | ModuleType] = (),
        backends: Sequence[AttentionBackend] = (),
        **options: Unpack[EngineOptions],
    ) -> None:
        """Load the model and start an engine. The options are those of the command line, see docs/cli.md."""
        config = EngineConfig.of(model, **options)
        self._start(config, Extensions(tuple(schedules), tuple(map(family_of, families)), tuple(backends)))

    @classmethod
    def from_config(cls, config: EngineConfig, extensions: Extensions = NONE_ADDED) -> LLM:
        """An LLM from a resolved configuration."""
        llm = cls.__new__(cls)
        llm._start(config, extensions)
        return llm

    def _start(self, config: EngineConfig, extensions: Extensions) -> None:
        setup = resolve(config, extensions)
        self.tokenizer: Any = load_tokenizer(setup.source)
        check_template(self.tokenizer, setup.source)
        self.engine = Engine(config, self.tokenizer, setup)
        self._ids = count()
        self._live: set[str] = set()  # requests that a call waits for
        self._done: dict[str, RequestOutput] = {}  # outputs of those that have finished

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or a batch; outputs are in the order of the prompts.

        Raises `RequestError` before anything is computed if a prompt can never be served.
        """
        batch = _as_batch(prompts)
        each = _params_for(batch, params)
        ids = self._add_all(batch, each)
        try:
            while any(request_id not in self._done for request_id in ids):
                self._advance()
            return [self._done[request_id] for request_id in ids]
        finally:
            self._forget(ids)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the request's output after every step that changed it; the last output is `finished`.

        A step that gives it no token (a chunk of a long prompt) yields nothing. Closing the iterator aborts the
        request.
        """
        (request_id,) = self._add_all([prompt], [params or SamplingParams()])
        try:
            while request_id not in self._done:
                for output in self._advance():
                    if output.request_id == request_id and not output.finished:
                        yield output
            yield self._done[request_id]
        finally:
            self._forget([request_id])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        if self.tokenizer is None:
            raise RequestError("prompt", repr(text[:20]), "is text and this model has no tokenizer", "give token ids")
        return list(self.tokenizer.encode(text))

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise RequestError(
                "messages", len(messages), "need a chat template and this model has none", "use generate"
            )
        return list(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))

    def stats(self) -> EngineStats:
        """Requests, pages and counters of the engine at this moment."""
        return self.engine.stats()

    def shutdown(self) -> None:
        """End every rank. May be called more than once."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _advance(self) -> list[RequestOutput]:
        """Run one engine step. Finished outputs are kept: they may belong to another call, such as an open `stream`."""
        outputs = self.engine.step()
        self._done.update({o.request_id: o for o in outputs if o.finished and o.request_id in self._live})
        return outputs

    def _forget(self, ids: Sequence[str]) -> None:
        """Abort requests that have not finished and drop the outputs of those that have: their call is over."""
        for request_id in ids:
            self.engine.abort(request_id)
            self._live.discard(request_id)
            self._done.pop(request_id, None)

    def _add_all(self, batch: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[str]:
        ids: list[str] = []
        try:
            for prompt, each in zip(batch, params, strict=True):
                text = prompt if isinstance(prompt, str) else None
                tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
                request_id = f"request-{next(self._ids)}"
                self.engine.add_request(request_id, tokens, each, text)
                ids.append(request_id)
        except BaseException:
            self._forget(ids)
            raise
        self._live.update(ids)
        return ids


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(
    batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise RequestError(
            "params", len(params), f"does not match {len(batch)} prompts", "give one for each, or one for all"
        )
    return list(params)
