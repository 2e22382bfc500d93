"""Ranks as processes over gloo: the same tokens as with threads, and an error within seconds when one dies."""

import os
import signal
import time
from dataclasses import replace
from threading import Event

import pytest

from longspan import LLM, ConfigError, SamplingParams, WorkerDied
from longspan.config import CostConstants, EngineConfig, LivenessConfig
from longspan.errors import StepTimeout
from tests.engine.conftest import DEFAULTS, SHORT
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

PATIENCE = 10.0  # seconds; detection takes a fraction of one


def start(**options):
    named = {SHORT.get(name, name): value for name, value in options.items()}
    return LLM(tiny_folder("llama"), executor="processes", **{**DEFAULTS, **named})


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("layout", [{"pcp": 2, "schedule": "gather_kv"}, {"tp": 2, "dcp": 2, "schedule": "gather_q"}])
def test_tokens_and_bytes_equal_those_of_threads(layout):
    prompts = [prompt_of(length) for length in (1, 16, 100)]
    params = SamplingParams(temperature=0, max_tokens=8)
    with start(**layout) as llm:
        outputs = llm.generate(prompts, params)
        traffic = llm.stats().traffic
    named = {SHORT.get(name, name): value for name, value in layout.items()}
    with LLM(tiny_folder("llama"), executor="threads", **{**DEFAULTS, **named}) as reference:
        reference.generate(prompts, params)
        assert reference.stats().traffic == traffic
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(oracle("llama"), prompt, 8)[0]


def test_a_killed_rank_raises_worker_died_and_leaves_no_process():
    llm = start(pcp=2)
    ranks = llm.engine.executor.process_ids
    stream = llm.stream(prompt_of(16), SamplingParams(temperature=0, max_tokens=400))
    next(stream)
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 1 .*exit code -9"):
        for _ in stream:
            pass
    assert time.monotonic() - killed < PATIENCE
    llm.shutdown()
    assert not any(alive(rank) for rank in ranks)


def test_shutdown_leaves_no_process_and_may_be_repeated():
    llm = start(pcp=2)
    ranks = llm.engine.executor.process_ids
    assert all(alive(rank) for rank in ranks)
    llm.shutdown()
    llm.shutdown()
    assert not any(alive(rank) for rank in ranks)


def test_a_stopped_rank_raises_step_timeout():
    llm = start(pcp=2, step_timeout=1.0)
    ranks = llm.engine.executor.process_ids
    stream = llm.stream(prompt_of(16), SamplingParams(temperature=0, max_tokens=400))
    for _ in range(10):  # the first eight steps have no limit
        next(stream)
    os.kill(ranks[1], signal.SIGSTOP)
    with pytest.raises(StepTimeout, match=r"step \d+ \(1 tokens\) has not ended .* limit is 1\.0 s \(step_timeout\)"):
        for _ in stream:
            pass
    assert not any(alive(rank) for rank in ranks)


def test_a_rank_stopped_between_steps_is_detected_by_check():
    config = EngineConfig(
        tiny_folder("llama"), executor="processes", dtype="float32", cost=CostConstants(),
        liveness=LivenessConfig(heartbeat_interval=0.1, heartbeat_late=0.5, heartbeat_timeout=2.0),
    )  # fmt: skip
    with LLM.from_config(config) as llm:
        executor = llm.engine.executor
        for _ in range(10):
            executor.check()
        assert executor.late() is None
        os.kill(executor.process_ids[0], signal.SIGSTOP)
        reports = set()
        with pytest.raises(WorkerDied, match=r"rank 0 has not answered for .*: its process is stopped or hangs"):
            while True:
                executor.check()
                reports.add(executor.late())
                time.sleep(0.05)
        assert any("rank 0 has not answered" in late for late in reports if late)


def test_a_thread_that_hangs_raises_step_timeout():
    llm = LLM(tiny_folder("llama"), prefill_context_parallel_size=2, step_timeout=1.0, **DEFAULTS)
    stream = llm.stream(prompt_of(16), SamplingParams(temperature=0, max_tokens=400))
    for _ in range(10):
        next(stream)
    released = Event()
    llm.engine.executor.runners[1].start = lambda plan: released.wait()
    with pytest.raises(StepTimeout, match="a rank hangs"):
        for _ in stream:
            pass
    released.set()


def test_a_rank_killed_between_steps_is_detected_at_the_next_step():
    llm = start(pcp=2)
    os.kill(llm.engine.executor.process_ids[0], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(WorkerDied, match="rank 0 "):
        llm.generate(prompt_of(16), SamplingParams(temperature=0, max_tokens=4))
    assert time.monotonic() - killed < PATIENCE


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_an_engine_that_was_shut_down_refuses_requests(executor):
    llm = LLM(tiny_folder("llama"), executor=executor, **DEFAULTS)
    llm.shutdown()
    with pytest.raises(WorkerDied, match="shut down; start the engine again"):
        llm.generate(prompt_of(16), SamplingParams(temperature=0, max_tokens=4))


def test_a_configuration_error_is_raised_with_its_own_class(tmp_path):
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes=1"):
        start(pcp=2, kv_cache_memory_bytes=1)


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_the_error_of_a_failed_step_names_the_rank(executor, monkeypatch):
    llm = LLM(tiny_folder("llama"), executor=executor, prefill_context_parallel_size=2, **DEFAULTS)
    plan_of = llm.engine.scheduler.schedule
    monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda: replace(plan_of(), finished=("gone",)))
    with pytest.raises(WorkerDied, match=r"rank \d failed: KeyError: 'gone'"):
        llm.generate(prompt_of(16), SamplingParams(temperature=0, max_tokens=4))
    llm.shutdown()
