"""Pages that went to memory or disk and came back give the same tokens, on every layout; damaged ones are computed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from longspan import LLM, SamplingParams, WorkerDied
from longspan.cache.offload import LoadRates
from tests.engine.conftest import Start
from tests.oracle import greedy, oracle, prompt_of

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [prompt_of(61, seed) for seed in range(4)]
LAYOUTS = [
    {"pcp": 3},
    {"pp": 2},
    {"tp": 4, "dcp": 2},
    {"tp": 2, "pcp": 2, "dcp": 2, "pp": 2},
    {"pcp": 2, "schedule": "local"},
    {"pcp": 2, "async_scheduling": True},
    {"pcp": 2, "local_context": 80},
]
MODELS = ("llama", "deepseek-v3", "gpt-oss")
MODELS_ON_LAYOUTS = [  # every second pair
    (model, layout)
    for row, model in enumerate(MODELS)
    for column, layout in enumerate(LAYOUTS)
    if (row + column) % 2 == 0
]
PROCESSES = [("llama", {"pcp": 2, "tp": 2, "dcp": 2, "executor": "processes"})]


@pytest.fixture(autouse=True)
def always_load(monkeypatch):
    """Tiny models compute faster than anything loads."""
    monkeypatch.setattr(LoadRates, "pays", lambda *_: True)


@pytest.fixture
def small(tiny, tmp_path) -> Start:
    """An engine whose device holds one of the prompts, whose memory another, and whose disk the rest."""

    def start(model: str = "llama", **options) -> LLM:
        shards = options.get("pcp", 1) * options.get("dcp", 1)
        local = options.get("schedule") == "local" or options.get("local_context", 0) > len(PROMPTS[0])
        each = 24 if local else -(-24 // shards)
        tiers = {"kv_offload_memory": 20 << 10, "kv_offload_disk": f"{tmp_path}", "kv_offload_disk_bytes": 1 << 20}
        return tiny(model, **{"pages_per_shard": (each,) * shards, **tiers, **options})

    return start


@cache
def expected(model: str) -> list[list[int]]:
    return [greedy(oracle(model), prompt, 6)[0] for prompt in PROMPTS]


def tokens_of(llm) -> list[list[int]]:
    """One prompt after the other, so that each evicts those before."""
    return [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]


def serve_twice(llm, model: str = "llama") -> None:
    for _ in range(2):
        assert tokens_of(llm) == expected(model)
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(("model", "layout"), [*MODELS_ON_LAYOUTS, *PROCESSES], ids=str)
def test_pages_come_back_on_every_layout(small, layout, model):
    llm = small(model, **layout)
    serve_twice(llm, model)
    counters = llm.stats().offload
    assert counters.loaded_from_memory + counters.loaded_from_disk > 20
    assert counters.lost == 0


@pytest.mark.parametrize("tiers", ["memory", "disk"])
def test_either_tier_is_enough(small, tiers):
    absent = {"memory": {"kv_offload_disk": None}, "disk": {"kv_offload_memory": None}}[tiers]
    llm = small(**{"kv_offload_memory": 1 << 20, **absent})
    serve_twice(llm)
    counters = llm.stats().offload
    assert getattr(counters, f"loaded_from_{tiers}") == counters.loaded_from_memory + counters.loaded_from_disk == 60


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_a_quantised_cache_comes_back_the_same(small, dtype):
    llm = small("deepseek-v3", kv_cache_dtype=dtype, pcp=2, local_context=0)
    assert tokens_of(llm) == tokens_of(llm)
    assert llm.stats().offload.loaded_from_memory > 20


def test_what_comes_back_is_reported_as_cached(small):
    llm = small()
    tokens_of(llm)
    assert llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens == 60


def test_preempted_requests_find_their_pages_again(small):
    llm = small(pages_per_shard=(28,), max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=30)
    batch = [prompt_of(16, seed) for seed in range(4)]
    outputs = llm.generate(batch, params)
    assert [o.outputs[0].token_ids for o in outputs] == [greedy(oracle("llama"), prompt, 30)[0] for prompt in batch]
    assert llm.stats().scheduler.preemptions > 0
    assert llm.stats().offload.loaded_from_memory > 0


def damage(llm, tier: str) -> None:
    """Flip a bit in every 100 bytes of a tier."""
    path = Path(getattr(llm.engine.core.setup.config.cache.offload, f"{tier}_file"))
    with path.open("r+b") as file:
        content = bytearray(file.read())
        for at in range(0, len(content), 100):
            content[at] ^= 1
        file.seek(0)
        file.write(content)


@pytest.mark.parametrize("layout", [{}, {"pcp": 2, "pp": 2}, {"executor": "processes"}], ids=str)
def test_pages_damaged_on_disk_are_computed_again(small, layout):
    llm = small(kv_offload_memory=None, **layout)
    assert tokens_of(llm) == expected("llama")
    damage(llm, "disk")
    assert tokens_of(llm) == expected("llama")
    assert llm.stats().offload.lost > 20
    serve_twice(llm)
    assert llm.stats().offload.loaded_from_disk > 50


def test_a_full_disk_is_warned_of_once_and_costs_no_token(small, monkeypatch, caplog):
    tried = []

    def full(*_: object) -> int:
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with small("llama", pcp=2) as llm:
        for _ in range(2):
            assert tokens_of(llm) == expected("llama")
        counters = llm.stats().offload
        assert counters.spilled_to_disk == counters.loaded_from_disk == counters.lost == 0
        assert 0 < len(tried) < 2 * len(PROMPTS) * 15  # by two ranks in the first step alone, not at every eviction
    assert [record.name for record in caplog.records].count("longspan.cache") == 1


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_the_files_are_gone_once_the_engine_is(small, tmp_path, executor):
    llm = small(executor=executor)
    offload = llm.engine.core.setup.config.cache.offload
    files = [Path(offload.memory_file), Path(offload.disk_file)]
    assert list(tmp_path.iterdir()) == []
    assert all(file.exists() for file in files)
    llm.shutdown()
    assert not any(file.exists() for file in files)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_engine_that_cannot_start_leaves_no_file_open(small, monkeypatch):
    opened = open_files()

    def fails(_: object) -> None:
        raise WorkerDied("no rank today")

    monkeypatch.setattr("longspan.engine.driver.build.create_executor", fails)
    with pytest.raises(WorkerDied):
        small()
    assert open_files() == opened


def test_without_the_options_plans_copy_nothing(tiny):
    llm = tiny(pages_per_shard=(24,))
    serve_twice(llm)
    assert llm.engine.core.cache.offload is None
    assert llm.stats().offload.saved == 0
