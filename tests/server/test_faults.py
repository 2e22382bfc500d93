"""What kills, leaves, floods and ends a server; and what its requests notice of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from longspan.attention.schedules import SCHEDULES
from longspan.config import OffloadConfig, Speculation
from longspan.server.options import ServeOptions
from tests.server.running import Running, ascii_folder, expected, running

PATIENCE = 30.0
NOTICE = 5.0  # seconds; the promise is 2, and the machine may be busy


@pytest.fixture(scope="module")
def mortal() -> Iterator[Running]:
    """A server whose core is killed by one test after the other, mostly while it verifies drafts."""
    with running(speculative=Speculation("prompt-lookup", 4)) as server:
        yield server


def until(condition: Any, what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        time.sleep(0.02)


def stream_text(server: Running, body: dict[str, Any], on_piece: Any = None) -> str:
    """The text of a streamed completion; raises what the stream says went wrong."""
    text = ""
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                if on_piece:
                    on_piece(len(text))
    return text


def streams_with_a_kill(server: Running, victim: int) -> None:
    """Three streams in whose midst a process of the engine is killed; they have all their tokens."""
    prompts = [f"request number {number} " * 2 for number in range(3)]
    before, restarts, killed = server.engine.process_ids, server.engine.restarts, []

    def kill(length: int) -> None:
        if length > 20 and not killed:
            killed.append(victim)
            os.kill(before[victim], signal.SIGKILL)

    with ThreadPoolExecutor(3) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 120, "temperature": 0} for prompt in prompts]
        texts = list(pool.map(lambda body: stream_text(server, body, kill), bodies))
    assert texts == [expected(prompt, 120) for prompt in prompts]
    assert server.engine.restarts == restarts + 1
    drafted = re.search(
        r"^longspan:spec_decode_num_draft_tokens_total\{.*\} (.*)$", server.client.get("/metrics").text, re.M
    )
    assert drafted and float(drafted[1]) > 0
    assert not set(before) & set(server.engine.process_ids)
    assert server.used_pages() == 0


def test_streams_go_on_with_the_same_tokens_after_the_core_is_killed(mortal):
    streams_with_a_kill(mortal, 0)


def test_streams_go_on_with_the_same_tokens_after_a_rank_is_killed(two_ranks):
    streams_with_a_kill(two_ranks, -1)


def test_a_death_between_requests_is_noticed_and_mended(two_ranks):
    os.kill(two_ranks.engine.process_ids[1], signal.SIGKILL)
    until(lambda: two_ranks.client.get("/health").status_code == 503, "the server to notice", NOTICE)
    until(lambda: two_ranks.client.get("/health").status_code == 200, "the ranks to be back")
    assert two_ranks.complete("abc", 10)["choices"][0]["text"] == expected("abc", 10)


def test_sampled_tokens_are_the_same_after_a_death(mortal):
    body = {"prompt": "abc", "max_tokens": 100, "seed": 3, "frequency_penalty": 0.5}
    whole = stream_text(mortal, body)
    ids, restarts = mortal.engine.process_ids, mortal.engine.restarts
    again = stream_text(mortal, body, lambda length: length > 20 and _kill_once(ids))
    assert again == whole
    assert mortal.engine.restarts == restarts + 1


def _kill_once(ids: list[int]) -> None:
    if ids:
        os.kill(ids.pop(), signal.SIGKILL)


def test_a_request_whose_engine_dies_again_and_again_ends_with_an_error(mortal, monkeypatch):
    monkeypatch.setattr(mortal.engine, "_deliver", lambda outputs: _fail())
    answer = mortal.post("/v1/completions", {"prompt": "abc", "max_tokens": 5})
    assert answer.status_code == 503
    assert "failed 3 times while it worked on this request" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    monkeypatch.undo()
    until(lambda: mortal.client.get("/health").status_code == 200, "the ranks to be back")
    assert mortal.complete("abc", 5)["choices"][0]["text"] == expected("abc", 5)


def _fail() -> None:
    from longspan.errors import EngineError

    raise EngineError("made to fail")


def test_a_core_that_cannot_start_again_fails_requests_until_it_can(mortal):
    folder = Path(ascii_folder())
    away = folder.with_name("away")
    folder.rename(away)
    os.kill(mortal.engine.process_ids[0], signal.SIGKILL)
    try:
        until(lambda: mortal.client.get("/health").status_code == 503, "the server to notice")
        answer = mortal.post("/v1/completions", {"prompt": "abc"})
    finally:
        away.rename(folder)
    assert answer.status_code == 503
    until(lambda: mortal.client.get("/health").status_code == 200, "the ranks to be back")
    assert mortal.complete("abc", 5)["choices"][0]["text"] == expected("abc", 5)


def test_a_core_whose_parent_is_gone_before_it_looks_ends_by_itself():
    parent = subprocess.Popen(["sleep", "0"])
    parent.wait()
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "longspan.server.core_process", folder, str(parent.pid)]
        assert subprocess.run(command, timeout=PATIENCE, check=False, stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_pages(server, stream):
    body = json.dumps({"prompt": "abc " * 20, "max_tokens": 400, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.server.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: server.used_pages() > 10, "the request to run")
    until(lambda: server.used_pages() == 0, "the pages to be free", NOTICE)
    assert len(server.engine.output_processor) == 0


def test_requests_beyond_the_queue_are_refused_with_retry_after():
    with running(options=ServeOptions(port=0, max_queued_requests=0)) as server, ThreadPoolExecutor(16) as pool:
        body = {"prompt": "abc", "max_tokens": 120, "temperature": 0}
        in_flight = [pool.submit(stream_text, server, body) for _ in range(16)]
        until(lambda: len(server.engine.output_processor) == 16, "all to be accepted")
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert "--max-queued-requests" in answer.json()["error"]["message"]
        assert {future.result() for future in in_flight} == {expected("abc", 120)}
        assert server.complete("abc", 3)["choices"][0]["text"] == expected("abc", 3)
        answer = server.post("/v1/completions", {**body, "n": 17})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_a_first_signal_lets_requests_end_and_takes_no_new_ones():
    with running() as server, ThreadPoolExecutor(1) as pool:
        begun: list[int] = []
        body = {"prompt": "abc", "max_tokens": 200, "temperature": 0}
        in_flight = pool.submit(stream_text, server, body, begun.append)
        until(lambda: begun, "the stream to begin")
        server.loop.call_soon_threadsafe(server.server.handle_exit, signal.SIGTERM, None)
        until(lambda: not server.engine.is_ready, "the drain")
        assert in_flight.result() == expected("abc", 200)
        until(lambda: not server.engine.process_ids, "the ranks to end")


def test_a_second_signal_ends_requests_with_a_word():
    with running() as server, ThreadPoolExecutor(1) as pool:
        begun: list[int] = []
        in_flight = pool.submit(stream_text, server, {"prompt": "abc", "max_tokens": 500}, begun.append)
        until(lambda: begun, "the stream to begin")
        for _ in range(2):
            server.loop.call_soon_threadsafe(server.server.handle_exit, signal.SIGTERM, None)
        assert in_flight.exception(PATIENCE) is not None
        until(lambda: not server.engine.process_ids, "the ranks to end")


def test_health_and_metrics_tell_what_happened(server):
    assert server.client.get("/health").json() == {"status": "ready"}
    server.complete("metrics please", 7)
    server.post("/v1/completions", {"prompt": ""})
    text = server.client.get("/metrics").text
    for line in (
        'longspan:num_requests_running{model_name="tiny"} 0.0',
        'longspan:kv_cache_usage_perc{model_name="tiny",shard="1"} 0.0',
        'longspan:request_errors_total{model_name="tiny",status="400"}',
        'longspan:time_to_first_token_seconds_count{model_name="tiny"}',
        'longspan:inter_token_latency_seconds_bucket{le="0.001",model_name="tiny"}',
    ):
        assert line in text, line


def test_metrics_count_pages_that_were_offloaded_and_came_back():
    with running(pages=40, offload=OffloadConfig(memory_bytes=1 << 20)) as server:
        for prompt in ("a" * 120, "b" * 120, "a" * 120):
            server.complete(prompt, 4)
        counts = metric(server, "longspan:kv_offload_pages_total")
    assert counts['event="saved"'] > 10
    assert counts['event="loaded_from_memory"'] > 10
    assert counts['event="lost"'] == counts['event="loaded_from_disk"'] == 0


def metric(server: Running, name: str) -> dict[str, float]:
    """A metric's values by what stands beside the model's name."""
    lines = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return {line[line.index("{") + 1 : line.index(",model")]: float(line.split()[-1]) for line in lines}


def test_the_state_shows_where_a_running_request_lies(server):
    shown: list[dict[str, Any]] = []

    def has_all_pages() -> bool:
        shown[:] = server.client.get("/internal/state").json()["requests"]
        return any(sum(request["pages_by_shard"]) >= 25 for request in shown)

    with ThreadPoolExecutor(1) as pool:
        in_flight = pool.submit(server.complete, "a prompt over both ranks " * 4, 300)
        until(has_all_pages, "the prompt's pages to be shown")
        (request,) = shown
        assert request["prompt_tokens"] == 100
        assert sum(request["pages_by_shard"]) == sum(pages for _, pages in request["runs"])
        assert all(request["pages_by_shard"])
        in_flight.result()
    state = server.client.get("/internal/state").json()
    assert state["schedules"] == [
        {"name": one.name, "moves": one.moves, "colour": one.colour, "sentence": one.sentence}
        for one in SCHEDULES.values()
    ]
    assert state["requests"] == []
    assert state["steps"][-1]["decode_rows"] == 1
    assert state["totals"]["output_tokens"] >= 300
