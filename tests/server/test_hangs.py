"""Processes that exist and do not go on: they are noticed, `/health` says so, and requests end with their tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from longspan.config import LivenessConfig
from longspan.errors import WorkerDied
from tests.server.running import Running, expected, running
from tests.server.test_faults import stream_text, until

TOKENS = 120
PATIENCE = 180.0  # a machine with more to do starts three processes slowly
PATIENT = LivenessConfig(
    step_timeout=3.0, step_floor=3.0, heartbeat_interval=0.1, heartbeat_late=600, heartbeat_timeout=600
)


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    """Only a step's time tells it that its rank hangs."""
    with running(executor="processes", liveness=PATIENT) as server:
        yield server


def streams_while_stopped(server: Running, victim: int) -> list[str]:
    """What `/health` says from the victim's stop, in mid-stream, until the engine is back; streams lose nothing."""
    stopped, restarts, before = [], server.engine.restarts, server.engine.process_ids

    def stop(length: int) -> None:
        if length > 20 and not stopped:
            stopped.append(before[victim])
            os.kill(before[victim], signal.SIGSTOP)

    def is_noticed() -> bool:
        said.append(reason(server))
        return server.engine.restarts > restarts

    prompts = [f"request number {number} " * 2 for number in range(2)]
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        bodies = [{"prompt": prompt, "max_tokens": TOKENS, "temperature": 0} for prompt in prompts]
        texts = [pool.submit(stream_text, server, body, stop) for body in bodies]
        until(lambda: stopped, "the streams to begin", PATIENCE)
        try:
            until(is_noticed, "the hang to be noticed", PATIENCE)
            until(lambda: reason(server) == "", "the engine to be back", PATIENCE)
        except AssertionError:
            os.kill(stopped[0], signal.SIGCONT)  # so that the server can end
            raise
        assert [text.result() for text in texts] == [expected(prompt, TOKENS) for prompt in prompts]
    assert server.engine.restarts == restarts + 1
    until(lambda: not any(map(is_alive, before)), "the old processes to end")
    return [reason for reason in said if reason]


def reason(server: Running) -> str:
    """Why the server is not healthy; empty if it is."""
    answer = server.client.get("/health")
    return "" if answer.status_code == 200 else answer.json()["reason"]


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_core_that_is_stopped_is_unhealthy_at_once_and_replaced_soon(two_ranks):
    said = streams_while_stopped(two_ranks, 0)
    assert any("the engine's process" in reason and "has been silent for" in reason for reason in said)


def test_a_rank_that_is_stopped_is_unhealthy_at_once_and_replaced_soon(two_ranks):
    said = streams_while_stopped(two_ranks, 2)
    assert any("rank 1 has not answered for" in reason for reason in said)


def test_a_step_is_healthy_until_its_time_is_over_and_then_replaced_with_its_engine(patient, caplog):
    said = streams_while_stopped(patient, 1)
    assert all(reason.startswith("the engine starts again, after: step ") for reason in said)
    assert "has not ended after" in caplog.text
    assert "its limit is 3.0 s (step_timeout)" in caplog.text


def test_a_request_whose_steps_hang_again_and_again_ends_with_an_error(patient, monkeypatch):
    patient.complete("abc", 20)  # after the warm-up, whose steps have no limit

    def stop_rank(outputs: object) -> None:
        os.kill(patient.engine.process_ids[1], signal.SIGSTOP)

    monkeypatch.setattr(patient.engine, "_deliver", stop_rank)
    answer = patient.post("/v1/completions", {"prompt": "abc", "max_tokens": 50}, timeout=PATIENCE)
    monkeypatch.undo()
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    assert "failed 3 times while it worked on this request" in message
    assert "has not ended after" in message


def test_a_core_that_says_nothing_while_it_starts_is_given_up():
    with pytest.raises(WorkerDied, match="has been silent for"), running(liveness=LivenessConfig(start_timeout=0.3)):
        pass
