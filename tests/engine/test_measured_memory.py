"""The number of pages on a GPU: each rank measures what it has room for, and all take the smallest.

A CPU plays the GPU here; only the bytes that are free and the peak of a step are made up.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import msgspec
import pytest

from longspan import LLM, SamplingParams
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.engine.memory_use import MemoryUse
from longspan.engine.rank import build
from longspan.engine.rank.graphs import GraphRunner, graph_sizes
from longspan.engine.rank.profile import measure, require_room
from longspan.engine.rank.recorder import EagerRecorder
from longspan.engine.rank.runner import Runner
from longspan.engine.setup import resolve
from longspan.engine.transport.messages import RankReady
from longspan.errors import ConfigError
from longspan.server.messages import CoreReady
from tests.engine.conftest import DEFAULTS
from tests.engine.test_recorded_decode import RefillableCpu
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

MIB = 1 << 20
PEAK = 3 * MIB


class Memory:
    """A device of which every rank has a megabyte less than the rank before it; the largest steps take 3 MiB."""

    ranks = count()

    def __init__(self, device):
        self.number = next(Memory.ranks)

    def free(self):
        return (64 - self.number) * MIB

    def peak_of(self, run):
        run()
        return PEAK


@pytest.fixture
def measured(monkeypatch):
    """`measured(pcp=2)`: an engine whose ranks measure their memory."""
    monkeypatch.setattr(build, "CudaMemory", Memory)
    monkeypatch.setattr(Memory, "ranks", count())
    started = []

    def start(**sizes):
        options = {**DEFAULTS, **{f"{name}_parallel_size": size for name, size in sizes.items()}, "executor": "threads"}
        setup = resolve(EngineConfig.of(tiny_folder("llama"), **options))
        cache = replace(setup.config.cache, memory_measured=True)
        started.append(Engine(setup.config, setup=replace(setup, config=replace(setup.config, cache=cache))))
        return started[-1]

    yield start
    for engine in started:
        engine.shutdown()


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tensor": 2, "prefill_context": 2, "decode_context": 2}, {"pipeline": 2, "prefill_context": 2}],
    ids=str,
)
def test_all_ranks_take_the_number_of_pages_of_the_one_that_has_room_for_the_fewest(measured, sizes):
    engine = measured(**sizes)
    setup, ranks = engine.setup, engine.setup.grid.world_size
    page = setup.layout.bytes_per_token * setup.config.cache.page_size
    fewest = (int(0.9 * (64 - ranks + 1) * MIB) - PEAK) // page
    assert setup.pages_per_shard == (fewest,) * setup.grid.num_shards
    assert [pool.num_pages for pool in engine.core.cache.pools] == [fewest] * setup.grid.num_shards
    for runner in engine.executor.runners:
        assert {rows.values.shape[2] for rows in runner.attention.pool.layers.values()} == {fewest * 4}
    assert "KV cache 0.1" in setup.memory.note and setup.memory.note in setup.notes


def test_the_steps_that_are_measured_are_the_largest_that_the_scheduler_makes(measured, monkeypatch):
    rows = []
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self, plan: rows.append(plan.segments) or step(self, plan))
    scheduler = measured().setup.config.scheduler
    assert max(sum(s.length for s in segments) for segments in rows) == scheduler.step_tokens
    assert max(len(segments) for segments in rows) == scheduler.running_limit


def test_cuda_graphs_count_as_the_largest_and_what_another_one_adds():
    """Of 4 sizes: 10 MiB for the first, 2 for the second, so 16 in all."""
    frees = iter([90 * MIB, 80 * MIB, 78 * MIB, 85 * MIB])

    class Device(Memory):
        def free(self):
            return next(frees)

    with LLM(tiny_folder("llama"), **DEFAULTS) as llm:
        (runner,) = llm.engine.executor.runners
        backend = RefillableCpu()
        runner.attention.ops = replace(runner.attention.ops, backend=backend)
        graphs = GraphRunner(runner.model, runner.attention, backend, EagerRecorder(), 1, graph_sizes(8))
        use = measure(llm.engine.setup, Device(None), 100 * MIB, lambda pilot: (runner, graphs))
    assert (use.loaded, use.workspace, use.recordings) == (15 * MIB, PEAK, 16 * MIB)
    assert use.room == (90 - 15 - 3 - 16) * MIB // use.page
    assert len(graphs.recorded) == 2


def test_a_device_that_is_too_small_is_refused_with_what_is_needed_and_what_to_lower():
    use = MemoryUse(free=8 << 30, usable=7 << 30, loaded=5 << 30, workspace=3 << 30, recordings=1 << 30, page=1 << 20)
    with pytest.raises(ConfigError) as refused:
        require_room(use, 0.9)
    needed = ("9.0 GiB", "kernels 5.0", "workspace 3.0", "graphs 1.0", "8.0 GiB are free")
    for part in (*needed, "--max-num-batched-tokens", "--max-num-seqs", "--enforce-eager"):
        assert part in str(refused.value)


def test_an_engine_with_measured_memory_gives_the_tokens_of_the_oracle(measured, monkeypatch):
    monkeypatch.setattr(Memory, "free", lambda self: 5 * MIB)
    engine = measured(prefill_context=2)
    engine.add_request("a", prompt_of(21), SamplingParams(temperature=0, max_tokens=5))
    outputs = []
    while engine.has_unfinished:
        outputs = engine.step() or outputs
    assert outputs[-1].outputs[0].token_ids == greedy(oracle("llama"), prompt_of(21), 5)[0]


def test_the_driver_and_the_server_take_the_number_of_pages_from_the_ranks():
    use = MemoryUse(free=9, usable=8, loaded=1, workspace=2, recordings=3, page=1, pages=7)
    for message in (RankReady(0, None, use), CoreReady([], None, use)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)).memory == use
    setup = resolve(EngineConfig.of(tiny_folder("llama"), **DEFAULTS))
    settings = setup.with_memory(use)
    assert settings.pages_per_shard == (7,)
    assert settings.limits.cache_tokens == 7 * DEFAULTS["page_size"]
    assert setup.with_memory(None) is setup
