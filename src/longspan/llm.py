"""The Python interface: a model, prompts in, completions out.

It owns convenience only (tokenising, batching, streaming); everything else is the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any

from longspan.attention.backends import AttentionBackend
from longspan.attention.schedules import Schedule
from longspan.config import (
    CacheConfig,
    ClusterConfig,
    CostConstants,
    EngineConfig,
    LivenessConfig,
    OffloadConfig,
    ParallelConfig,
    SchedulerConfig,
    drafted_tokens,
)
from longspan.engine.driver.core import EngineStats
from longspan.engine.engine import Engine
from longspan.engine.extensions import NONE_ADDED, Extensions
from longspan.engine.setup import resolve
from longspan.errors import RequestError
from longspan.models.registry import Family, family_of
from longspan.request import RequestOutput, SamplingParams
from longspan.weights.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate, its context spread over ranks.

    `model` is a Hugging Face folder, a hub id, a `.gguf` file or `smollm2`. A prompt is text or token ids; text needs
    a tokenizer beside the weights. Use it in a `with` block, or call `shutdown` to end its ranks.

    A step that takes longer than `step_timeout` seconds raises `StepTimeout` and ends the ranks. The limit is the
    larger of 60 and 20 times what recent steps let expect by default; the first 8 steps, which compile, have none.
    Ranks as threads (`executor="threads"`) cannot be ended: one that hangs stays until the process ends.

    `schedules` (`longspan.attention.schedules`), `families` (each a module or a `longspan.models.registry.Family`) and
    `backends` (`longspan.attention.backends`) are added to the built-in ones; they need ranks as threads.

    >>> with LLM("smollm2", prefill_context_parallel_size=2) as llm:
    ...     print(llm.generate("The capital of France is")[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        prefill_context_parallel_size: int = 1,
        decode_context_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        ranks_per_node: int | None = None,
        page_size: int = 16,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        pages_per_shard: Sequence[int] | None = None,
        enable_prefix_caching: bool = True,
        kv_offload_memory: int | None = None,
        kv_offload_disk: str | None = None,
        kv_offload_disk_bytes: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        local_context: int | None = None,
        schedule: str = "auto",
        speculative: str | None = None,
        run_ahead: bool | None = None,
        executor: str = "auto",
        cluster: ClusterConfig | None = None,
        step_timeout: float | None = None,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        device: str = "auto",
        attention_backend: str = "auto",
        quantization: str = "auto",
        enforce_eager: bool = False,
        seed: int = 0,
        num_threads: int | None = None,
        debug: bool = False,
        cost: CostConstants | None = None,
        schedules: Sequence[Schedule] = (),
        families: Sequence[Family | ModuleType] = (),
        backends: Sequence[AttentionBackend] = (),
    ) -> None:
        config = EngineConfig(
            model=model, dtype=dtype, device=device, attention_backend=attention_backend, quantization=quantization,
            enforce_eager=enforce_eager, executor=executor, seed=seed, num_threads=num_threads, debug=debug,
            parallel=ParallelConfig(
                tensor_parallel_size, prefill_context_parallel_size, decode_context_parallel_size,
                pipeline_parallel_size, enable_expert_parallel, ranks_per_node,
            ),
            cache=CacheConfig(
                page_size, kv_cache_memory_bytes, None if pages_per_shard is None else tuple(pages_per_shard),
                enable_prefix_caching, kv_cache_dtype, gpu_memory_utilization,
                OffloadConfig(kv_offload_memory, kv_offload_disk, kv_offload_disk_bytes),
            ),
            scheduler=SchedulerConfig(
                max_num_batched_tokens, max_num_seqs, max_model_len, local_context, schedule,
                drafted_tokens(speculative), run_ahead,
            ), cost=cost, cluster=cluster or ClusterConfig(), liveness=LivenessConfig(step_timeout),
        )  # fmt: skip
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
        self.engine = Engine(config, self.tokenizer, setup)
        self._ids = count()
        self._live: set[str] = set()  # requests some call waits for
        self._done: dict[str, RequestOutput] = {}  # those of them that have finished

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or a batch; outputs are in the order of the prompts.

        Raises `RequestError` before anything is computed if one of them can never be served.
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
        """Yield the request's output after every step that changed it; the last one is `finished`.

        Steps without a token (a long prompt's chunks) yield nothing; closing the iterator aborts the request.
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
        """What is in use and what has travelled so far."""
        return self.engine.stats()

    def shutdown(self) -> None:
        """End every rank; safe to call again."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _advance(self) -> list[RequestOutput]:
        """One engine step; what finished is kept for the call it belongs to, which may be another's."""
        outputs = self.engine.step()
        self._done.update({o.request_id: o for o in outputs if o.finished and o.request_id in self._live})
        return outputs

    def _forget(self, ids: Sequence[str]) -> None:
        """The call is over, whether its requests are or not."""
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
