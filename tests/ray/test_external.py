"""Ranks that the user starts, as `torchrun` does: they connect, serve, and end with their driver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from longspan import LLM, ConfigError, SamplingParams, WorkerDied, __version__
from longspan.config import ClusterConfig
from longspan.engine.rank.external_rank import main
from longspan.engine.transport.messages import RankHello, RankRefused
from tests.engine.conftest import DEFAULTS
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

PATIENCE = 30.0
DRIVER = """
import sys
from longspan import LLM
from longspan.config import ClusterConfig
from tests.engine.conftest import DEFAULTS
cluster = ClusterConfig(listen=sys.argv[2])
llm = LLM(sys.argv[1], executor="external", cluster=cluster, prefill_context_parallel_size=2, **DEFAULTS)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def address() -> str:
    """A free address for a driver."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def rank(address: str, number: int, size: int) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "longspan.engine.rank.external_rank", address]
    named = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}
    return subprocess.Popen(program, env=named, stderr=subprocess.PIPE, text=True)


@contextmanager
def two_ranks(address: str) -> Iterator[list[subprocess.Popen[str]]]:
    ranks = [rank(address, number, 2) for number in range(2)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate(timeout=PATIENCE)


def drive(address: str, timeout: float = 120.0):
    cluster = ClusterConfig(listen=address, timeout=timeout)
    return LLM(tiny_folder("llama"), executor="external", cluster=cluster, prefill_context_parallel_size=2, **DEFAULTS)


def test_ranks_exit_with_0_when_the_driver_stops_them(address):
    with two_ranks(address) as ranks:
        with drive(address) as llm:
            [output] = llm.generate([prompt_of(100)], SamplingParams(temperature=0, max_tokens=8))
            assert output.outputs[0].token_ids == greedy(oracle("llama"), prompt_of(100), 8)[0]
        assert [process.wait(PATIENCE) for process in ranks] == [0, 0]


def test_a_killed_rank_ends_the_engine_and_the_other_rank_exits_with_1(address):
    with two_ranks(address) as ranks:
        llm = drive(address)
        stream = llm.stream(prompt_of(16), SamplingParams(temperature=0, max_tokens=400))
        next(stream)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(WorkerDied, match="rank 1 has ended, or its host cannot be reached"):
            for _ in stream:
                pass
        assert time.monotonic() - killed < PATIENCE
        assert ranks[0].wait(PATIENCE) == 1


def test_ranks_exit_with_1_when_their_driver_is_killed(address):
    with two_ranks(address) as ranks:
        command = [sys.executable, "-c", DRIVER, tiny_folder("llama"), address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
            assert driver.stdout.readline() == b"ready\n"
            driver.kill()
        assert [process.wait(PATIENCE) for process in ranks] == [1, 1]


def test_a_rank_of_another_layout_is_refused_and_the_driver_waits_for_the_others(address):
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(address)
        stranger.send(msgspec.msgpack.encode(RankHello(0, 4, __version__, "127.0.0.1", 1)))
        with pytest.raises(ConfigError, match=r"seconds have passed, and rank 0, 1 of 2 has not reported to tcp://"):
            drive(address, 1.0)
        answer = msgspec.msgpack.decode(stranger.recv(), type=RankRefused)
        assert answer.reason == "the driver's layout has 2 ranks, and this is one of 4"


def test_a_rank_that_is_refused_prints_the_reason(address, capsys):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as driver, ThreadPoolExecutor(1) as pool:
        driver.bind(address)
        code = pool.submit(main, [address], {"RANK": "1", "WORLD_SIZE": "2"})
        name, _ = driver.recv_multipart()
        driver.send_multipart([name, msgspec.msgpack.encode(RankRefused("no place"))])
        assert code.result(PATIENCE) == 2
        assert "rank=1: no place; see the driver's output" in capsys.readouterr().err


@pytest.mark.parametrize("listen", ["tcp://192.0.2.123:7000", "tcp://127.0.0.1", "nonsense"])
def test_an_address_that_cannot_be_bound_is_refused(listen):
    with pytest.raises(ConfigError, match=f"listen={listen}: cannot be listened at .*; give an address of this host"):
        drive(listen)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "driver: is not one address"),
        (["tcp://127.0.0.1:7000"], {}, "RANK=(unset): is not a number; start the ranks with torchrun"),
        (["tcp://127.0.0.1:7000"], {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: is not a number"),
        (["tcp://no.such.host.invalid:7000"], {"RANK": "1", "WORLD_SIZE": "2"}, "cannot be reached"),
        (
            ["127.0.0.1:7000"],
            {"RANK": "1", "WORLD_SIZE": "2"},
            "cannot be reached (not an address); give tcp://host:port",
        ),
    ],
)
def test_invalid_arguments_of_a_rank_are_named_and_exit_with_2(arguments, environment, message, capsys):
    assert main(arguments, environment) == 2
    assert message in capsys.readouterr().err
