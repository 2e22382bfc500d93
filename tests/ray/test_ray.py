"""Ranks as Ray actors: the same tokens as with threads, resources that are reserved and freed, and actors that die.

All tests use one small cluster of this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from longspan import LLM, ConfigError, SamplingParams, WorkerDied
from longspan.config import ClusterConfig
from tests.engine.conftest import DEFAULTS, SHORT
from tests.oracle import prompt_of, tiny_folder

ray = pytest.importorskip("ray", reason="Ray is not installed")
PATIENCE = 20.0
CPUS = 4
LAYOUT = {"pcp": 2, "schedule": "gather_q"}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
DRIVER = """
import sys
from longspan import LLM
from longspan.config import ClusterConfig
from tests.engine.conftest import DEFAULTS
cluster = ClusterConfig(ray_address=sys.argv[2])
llm = LLM(sys.argv[1], executor="ray", cluster=cluster, prefill_context_parallel_size=2, **DEFAULTS)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """The address of the cluster."""
    context = ray.init(
        "local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        namespace="tests",
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    ray.shutdown()


def start(**options):
    named = {SHORT.get(name, name): value for name, value in options.items()}
    return LLM(tiny_folder("llama"), **{**DEFAULTS, "executor": "ray", **named})


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate([prompt_of(n) for n in (1, 16, 100)], GREEDY)]


def rank_ids() -> list[int]:
    """Process ids of the cluster's actors that are alive."""
    return [actor["Pid"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def reference():
    """Tokens and traffic of the same ranks as threads."""
    with start(executor="threads", **LAYOUT) as llm:
        return tokens(llm), llm.stats().traffic


@pytest.fixture(scope="module")
def actors(cluster) -> Iterator[LLM]:
    """An engine whose ranks are actors; the last test that uses it kills one."""
    with start(**LAYOUT) as llm:
        yield llm


def test_tokens_and_bytes_equal_those_of_threads(actors, reference):
    assert (tokens(actors), actors.stats().traffic) == reference


def test_resources_in_use_are_waited_for(actors):
    assert len(rank_ids()) == 2
    with pytest.raises(ConfigError, match="have 4 that others use; wait for them"):
        start(pcp=3, cluster=ClusterConfig(timeout=0.5))


def test_a_killed_actor_ends_the_generation_and_a_new_engine_gives_the_same_tokens(actors, reference):
    stream = actors.stream(prompt_of(16), SamplingParams(temperature=0, max_tokens=400))
    next(stream)
    os.kill(rank_ids()[0], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank \d ended: .*died"):
        for _ in stream:
            pass
    assert time.monotonic() - killed < PATIENCE
    until(lambda: not rank_ids(), "the other actor's end")
    with start(**LAYOUT) as again:
        assert tokens(again) == reference[0]
        again.shutdown()
        again.shutdown()
    until(lambda: ray.available_resources().get("CPU") == CPUS, "the resources")


def test_a_killed_driver_leaves_no_actor_behind(cluster):
    command = [sys.executable, "-c", DRIVER, tiny_folder("llama"), cluster]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdout.readline() == b"ready\n"
        assert len(rank_ids()) == 2
        driver.kill()
    until(lambda: not rank_ids(), "the end of the actors")
    until(lambda: ray.available_resources().get("CPU") == CPUS, "the resources")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 6}, r"needs 6 CPUs in runs of 6 on one machine.* have 4; use --tensor-parallel-size 4"),
        ({"tp": 2, "pcp": 3}, r"needs 6 CPUs in runs of 2 on one machine.* have 4; use --prefill-.*-size 2"),
    ],
)
def test_the_error_for_too_few_resources_names_what_there_is_and_what_fits(layout, message):
    with pytest.raises(ConfigError, match=message):
        start(**layout, cluster=ClusterConfig(timeout=0.5))


def test_the_error_without_ray_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"executor=ray: Ray is not installed .*pip install 'longspan\[ray\]'"):
        start()
