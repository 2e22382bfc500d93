"""A prefill and a decode instance in this process, each stepped by its own thread, and transformers' tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from threading import Event, Thread
from typing import Any

from longspan.config import CacheConfig, CostConstants, EngineConfig, ParallelConfig, SchedulerConfig, TransferConfig
from longspan.engine.driver.build import build_core
from longspan.engine.setup import EngineSetup, resolve
from longspan.parallel.sharding import Sharding
from longspan.request import CoreRequest, FinishReason, SamplingParams, TokenOutput
from tests.oracle import greedy, oracle, tiny_folder

PATIENCE = 60.0
SIZES = {
    "tp": "tensor_parallel_size", "pcp": "prefill_context_parallel_size", "dcp": "decode_context_parallel_size",
    "pp": "pipeline_parallel_size",
}  # fmt: skip


def config_of(
    model: str = "llama", page_size: int = 4, executor: str = "threads", kv: str = "auto", budget: int = 48,
    transfer: TransferConfig | None = None, memory: int = 1 << 20, dtype: str = "float32", **sizes: int,
) -> EngineConfig:  # fmt: skip
    """A tiny engine; sizes are tp, pcp, dcp, pp."""
    return EngineConfig(
        tiny_folder(model), executor=executor, num_threads=1, debug=True, dtype=dtype,
        parallel=ParallelConfig(**{SIZES[name]: size for name, size in sizes.items()}),
        cache=CacheConfig(page_size=page_size, memory_bytes=memory, dtype=kv),
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=8, local_context=8),
        cost=CostConstants(), transfer=transfer,
    )  # fmt: skip


class Running:
    """A core that a thread steps, as the core's process of a server does."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = build_core(resolve(config))
        self.outputs: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.ended: dict[str, Event] = {}
        self.failure: BaseException | None = None
        self._todo: list[Any] = []
        self._stop = False
        self.pause_when: Callable[[], bool] = lambda: False
        self._thread = Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return self.core.role.info.address

    def call(self, action: Any) -> None:
        """Let the stepping thread call `action`."""
        self._todo.append(action)

    def start(self, request_id: str, prompt: Sequence[int], tokens: int, prefill_at: Sequence[str] = (), **params: Any):
        self.ended[request_id] = Event()
        self.outputs[request_id] = []
        sampling = SamplingParams(temperature=0, max_tokens=tokens, **params)
        request = CoreRequest(request_id, list(prompt), sampling, 0, tokens, prefill_at=tuple(prefill_at))
        self.call(lambda: self.core.add(request))

    def result(self, request_id: str) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        while not self.ended[request_id].wait(0.05):
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline, "no result"
        return self.outputs[request_id]

    def settle(self) -> None:
        """Wait until all requests have ended and no page is held; checks that none is lost."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(self._idle):
            assert time.monotonic() < deadline, "pages are still held"
            time.sleep(0.01)

    def evaluate(self, question: Any) -> Any:
        """The result of `question`, called by the stepping thread."""
        done: Event = Event()
        answers: list[Any] = []
        self.call(lambda: (answers.append(question()), done.set()))
        assert done.wait(PATIENCE)
        return answers[0]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)

    @property
    def bytes_here(self) -> int:
        """Bytes of KV that have arrived in the pools."""
        return sum(runner.transfer.received for runner in self.core.executor.runners)

    def close(self) -> None:
        self._stop = True
        self._thread.join(PATIENCE)
        self.core.shutdown()

    def _idle(self) -> bool:
        self.core.scheduler.check_integrity()
        return not self.core.has_unfinished and not sum(map(self.core.cache.used, range(self.core.cache.num_shards)))

    def _loop(self) -> None:
        try:
            while not self._stop:
                while self._todo:
                    self._todo.pop(0)()
                paused = self.pause_when()
                for output in () if paused else self.core.step():
                    self._take(output)
                if paused or not self.core.has_unfinished:
                    time.sleep(0.002)
        except BaseException as error:
            self.failure = error

    def _take(self, output: TokenOutput) -> None:
        self.outputs[output.request_id] += [token.token_id for token in output.tokens]
        self.cached[output.request_id] = output.num_cached_tokens
        if output.finish_reason is not None:
            assert output.finish_reason is not FinishReason.ERROR, output.error
            self.ended[output.request_id].set()


@dataclass(frozen=True)
class Pair:
    prefill: Running
    decode: Running

    def complete(self, request_id: str, prompt: Sequence[int], tokens: int = 8, **params: Any) -> list[int]:
        """The tokens of a request whose prompt the prefill instance computes."""
        self.decode.start(request_id, prompt, tokens, (self.prefill.address,), **params)
        return self.decode.result(request_id)

    def assert_fetched(self, *tokens: int) -> None:
        """The decode instance has fetched so many prompts, with these numbers of tokens and all their bytes."""
        counters = self.decode.core.role.counters
        assert (counters.fetched, counters.tokens) == (len(tokens), sum(tokens))
        assert counters.bytes == sum(tokens) * stored_bytes(self.decode.core.setup)


def stored_bytes(setup: EngineSetup) -> int:
    """Bytes of one token on all ranks that store a part of it. Every replica of a KV head counts."""
    model, total = setup.model, 0
    for place in setup.grid.ranks:
        if place.shard:  # a token is on one shard, so count the ranks of the first
            continue
        sharding = Sharding(setup.grid, place.rank, model.num_q_heads, model.num_kv_heads)
        layers, heads = sharding.extent("layers", model.num_layers), sharding.kv_extent
        part = replace(setup.layout, num_layers=layers[1] - layers[0], kv_heads=heads[1] - heads[0])
        total += part.bytes_per_token
    return total


@contextmanager
def pair(prefill: EngineConfig, decode: EngineConfig, **options: Any) -> Iterator[Pair]:
    """Starts both instances, and ends them with the block."""
    options = {"block_bytes": 4096, **options}
    sides: list[Running] = []
    try:
        for role, config in (("prefill", prefill), ("decode", decode)):
            sides.append(Running(replace(config, transfer=TransferConfig(role, **options))))
        yield Pair(*sides)
    finally:
        for side in sides:
            side.close()


@cache
def expected(model: str, prompt: tuple[int, ...], tokens: int = 8) -> list[int]:
    """The tokens that transformers generates."""
    return greedy(oracle(model), prompt, tokens)[0]
