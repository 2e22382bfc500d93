"""`longspan bench serve` against a small fake server: schedules, streams, failures, definitions and output."""

import asyncio
import json
import socket
import threading
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean

import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from typer.testing import CliRunner

from longspan.bench.serving.client import Failure, Finished, Outcome, Target, run_load
from longspan.bench.serving.dataset import LoadRequest, RequestLoad, open_dataset, poisson_arrivals, trace_arrivals
from longspan.bench.serving.report import Spread, spread, summarise
from longspan.bench.serving.stream import EventSplitter, StreamedReply, error_message
from longspan.cli.bench_serve import serve
from longspan.errors import ConfigError

KEY = "sesame"


class FakeServer:
    """Answers every prompt with `max_tokens` words; the model's name says how it misbehaves."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.ports: set[int] = set()
        self.running = self.most = 0
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/v1/models")(lambda: {"data": [{"id": "good"}, {"id": "other"}]})
        app.post("/v1/completions", response_model=None)(self.answer)
        app.post("/v1/chat/completions", response_model=None)(self.answer)
        return app

    async def answer(self, request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        self.bodies.append(body)
        self.ports.add(request.client.port)
        if body["model"] == "flaky" and len(self.bodies) % 2:
            return JSONResponse({"error": {"message": "too busy"}}, status_code=503)
        if body["model"] == "locked" and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async for event in self.events(body):
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
        finally:
            self.running -= 1

    async def events(self, body: dict):
        model, tokens = body["model"], body["max_tokens"]
        for number in range(0 if model == "silent" else tokens):
            await asyncio.sleep(60 if model == "stuck" else 0.002)
            if model in ("angry", "dying") and number == 2:
                yield {"error": {"message": "out of memory"}}
            if model in ("cut", "dying") and number == 2:
                raise ConnectionError("the test's server stops here")
            piece = {"delta": {"content": "wörd "}} if "messages" in body else {"text": "wörd "}
            yield {"choices": [{**piece, "finish_reason": None}]}
        if model != "countless":
            yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
        if model != "unfinished":
            yield "[DONE]"


@pytest.fixture
def server():
    fake = FakeServer()
    config = uvicorn.Config(fake.app(), port=0, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn_server = uvicorn.Server(config)
    started = threading.Event()
    startup = uvicorn_server.startup

    async def announce(sockets=None):
        await startup(sockets)
        started.set()

    uvicorn_server.startup = announce
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    assert started.wait(20)
    fake.url = f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    yield fake
    uvicorn_server.should_exit = True
    thread.join(20)


def send(server, count=4, concurrency=None, max_tokens=3, **target) -> Finished:
    requests = [LoadRequest(0.0, [1, 2, 3], max_tokens) for _ in range(count)]
    target = Target(server.url, **{"model": "good", **target})
    return asyncio.run(run_load(target, requests, concurrency, lambda done, total: None))


@contextmanager
def saying(answer: bytes):
    """A server that takes one request, says `answer` and hangs up."""

    def take_one():
        connection, _ = listener.accept()
        with connection:
            request = b""
            while not request.endswith(b"}"):
                request += connection.recv(1 << 16)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=take_one, daemon=True)
        thread.start()
        fake = FakeServer()
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield fake
        thread.join(20)


def kinds(finished: Finished) -> list[str | None]:
    return [outcome.failure and outcome.failure.kind for outcome in finished.outcomes]


def run_cli(*options: object):
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, [str(option) for option in options])


def write_lines(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def trace_row(timestamp, length, hash_ids, output=5) -> dict:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": hash_ids}


# When requests leave


def test_without_a_rate_all_requests_leave_at_once():
    assert poisson_arrivals(3, None, seed=0) == [0, 0, 0]


def test_poisson_arrivals_begin_at_zero_and_have_the_rate_on_average():
    arrivals = poisson_arrivals(4000, rate=50, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert arrivals[0] == 0
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_arrivals_depend_on_the_seed_alone():
    assert poisson_arrivals(9, 2, seed=3) == poisson_arrivals(9, 2, seed=3) != poisson_arrivals(9, 2, seed=4)


def test_a_traces_times_count_from_its_earliest_and_shrink_with_speedup():
    assert trace_arrivals([3000, 5000, 4000], speedup=2) == [0, 1, 0.5]


# What is sent


def test_equal_hash_ids_are_equal_tokens_and_the_last_block_is_cut(tmp_path):
    rows = [trace_row(0, 1100, [7, 8, 9]), trace_row(10, 1024, [7, 9]), trace_row(20, 600, [1, 8])]
    load = RequestLoad("trace", write_lines(tmp_path / "t.jsonl", *rows))
    first, second, third = (request.prompt for request in open_dataset(load).requests(0))
    assert [len(first), len(second), len(third)] == [1100, 1024, 600]
    assert first[:512] == second[:512]
    assert first[1024:] == second[512 : 512 + 76]
    assert first[512:600] == third[512:600]  # block 8, cut to what is left of 600
    assert third[:512] != first[:512]


def test_another_run_of_a_trace_has_other_tokens_of_the_same_lengths(tmp_path):
    dataset = open_dataset(RequestLoad("trace", write_lines(tmp_path / "t.jsonl", trace_row(0, 700, [1, 2]))))
    (first,), (second,) = dataset.requests(0), dataset.requests(1)
    assert len(first.prompt) == len(second.prompt)
    assert first.prompt[:512] != second.prompt[:512]


def test_long_rows_of_a_trace_are_cut_and_the_report_says_so(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", trace_row(0, 900, [1, 2]), trace_row(0, 100, [3]))
    dataset = open_dataset(RequestLoad("trace", path, num_prompts=2, max_input_len=300))
    assert [len(request.prompt) for request in dataset.requests(0)] == [300, 100]
    assert dataset.notes(1) == ["1 of 2 prompts cut to 300 tokens"]


def test_a_trace_asks_for_its_own_output_lengths_unless_told_otherwise(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", trace_row(0, 10, [1], output=42))
    assert [r.max_tokens for r in open_dataset(RequestLoad("trace", path)).requests(0)] == [42]
    assert [r.max_tokens for r in open_dataset(RequestLoad("trace", path, output_len=3)).requests(0)] == [3]


def test_random_prompts_share_a_prefix_and_differ_behind_it():
    prompts = [r.prompt for r in open_dataset(RequestLoad(num_prompts=5, input_len=20, prefix_len=8)).requests(0)]
    assert {len(prompt) for prompt in prompts} == {28}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 1
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 5


def test_random_lengths_lie_within_the_fraction_given():
    requests = list(open_dataset(RequestLoad(num_prompts=50, input_len=100, output_len=10, vary=0.3)).requests(0))
    assert all(70 <= len(request.prompt) <= 130 and 7 <= request.max_tokens <= 13 for request in requests)
    assert len({len(request.prompt) for request in requests}) > 5


def test_random_ids_lie_below_the_vocabulary_size():
    (request,) = open_dataset(RequestLoad(num_prompts=1, vocab_size=10)).requests(0)
    assert set(request.prompt) == set(range(10))


def test_random_text_has_a_word_for_each_token():
    (request,) = open_dataset(RequestLoad(num_prompts=1, input_len=30, text_prompts=True)).requests(0)
    assert len(request.prompt.split(" ")) == 30


def test_texts_are_not_sent_again_in_the_next_run_while_the_file_has_more(tmp_path):
    path = write_lines(tmp_path / "g.jsonl", *({"question": f"q{n}", "answer": "1"} for n in range(6)))
    dataset = open_dataset(RequestLoad("gsm8k", path, num_prompts=3))
    runs = [{request.prompt for request in dataset.requests(run)} for run in (0, 1)]
    assert runs[0] | runs[1] == {f"q{n}" for n in range(6)}
    assert dataset.notes(2) == []
    assert "6 prompts repeat" in dataset.notes(3)[0]


def test_a_conversations_prompt_is_what_its_human_says_first(tmp_path):
    human, machine = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}
    talks = [{"conversations": [machine, human, machine, {**human, "value": "more"}]}, {"conversations": [machine]}]
    path = write_lines(tmp_path / "s.json", talks)
    assert [r.prompt for r in open_dataset(RequestLoad("sharegpt", path, num_prompts=1)).requests(0)] == ["hello"]
    assert "1 prompts repeat" in open_dataset(RequestLoad("sharegpt", path, num_prompts=2)).notes(1)[0]


GOOD = json.dumps(trace_row(0, 5, [1]))
MALFORMED = {
    "not JSON": ("trace", f"{GOOD}\n{{", ["line 2", "truncated", '"hash_ids"']),
    "a field is missing": ("trace", f'{GOOD}\n\n{{"timestamp": 0, "input_length": 3}}', ["line 3", "output_length"]),
    "a field's type": ("trace", GOOD.replace("5", '"x"', 1), ["line 1", "Expected `int`, got `str`", "input_length"]),
    "a field's range": ("trace", GOOD.replace('"timestamp": 0', '"timestamp": -1'), ["line 1", ">= 0", "timestamp"]),
    "too few blocks": ("trace", json.dumps(trace_row(0, 1000, [1])), ["line 1", "Expected 2 ids", "hash_ids"]),
    "not UTF-8": ("gsm8k", b'{"question": "\xff"}', ["line 1", "utf-8", '"question"']),
    "no question": ("gsm8k", '{"answer": "3"}', ["line 1", "question"]),
    "a turn without text": ("sharegpt", '[{"conversations": [{"from": "human"}]}]', ["entry 1", "value"]),
    "no list": ("sharegpt", '{"conversations": []}', ["Expected `array`", '"human"']),
    "nothing": ("trace", "\n", ["holds no request"]),
    "no human": ("sharegpt", '[{"conversations": []}]', ["holds no prompt"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_dataset_is_named_with_its_place_and_what_was_expected(tmp_path, name):
    dataset, content, expected = MALFORMED[name]
    path = tmp_path / "data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as error:
        open_dataset(RequestLoad(dataset, str(path)))
    assert all(part in str(error.value) for part in (*expected, str(path)))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"speedup": 2.0}, "speedup"),
        ({"dataset_path": "x"}, "dataset_path"),
        ({"dataset": "gsm8k"}, "dataset_path"),
        ({"dataset": "gsm8k", "dataset_path": "x", "vary": 0.5}, "vary"),
        ({"dataset": "trace", "dataset_path": "x", "request_rate": 1.0}, "request_rate"),
        ({"vary": 1.0}, "vary"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"dataset": "novels"}, "dataset"),
    ],
)
def test_an_option_without_use_or_out_of_range_is_an_error_that_names_it(options, field):
    with pytest.raises(ConfigError) as error:
        RequestLoad(**options)
    assert error.value.field == field


# Streams


STREAM = (
    ': hello\n\ndata: {"choices":[{"text":"é€"}]}\n\nevent: x\r\ndata:{"choices":[{"text":"b"}]}\r\n\r\n'
    'data: {"choices":[],\ndata: "usage":{"prompt_tokens":4,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
).encode()


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_a_stream_cut_at_any_byte_has_the_same_events(cut):
    splitter = EventSplitter()
    events = splitter.feed(STREAM[:cut]) + splitter.feed(STREAM[cut:])
    assert [json.loads(event) for event in events[:-1]] == [
        {"choices": [{"text": "é€"}]},
        {"choices": [{"text": "b"}]},
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}},
    ]
    assert events[-1] == b"[DONE]"


def test_a_reply_fed_byte_by_byte_has_tokens_usage_and_end():
    reply = StreamedReply()
    for now, byte in enumerate(STREAM):
        reply.feed(bytes([byte]), now)
    assert len(reply.chunk_times) == 2
    assert (reply.prompt_tokens, reply.completion_tokens, reply.done) == (4, 2, True)


def test_an_end_without_its_empty_line_still_ends_the_reply():
    reply = StreamedReply()
    reply.feed(b"data: [DONE]", 0)
    assert not reply.done
    reply.close()
    assert reply.done


CHAT = [
    {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
    {"delta": {"content": "a"}, "finish_reason": None},
    {"delta": {"content": ""}, "finish_reason": None},
    {"delta": {"reasoning_content": "b"}, "finish_reason": None},
    {"delta": {}, "finish_reason": "stop"},
]


def chunk_times(choices) -> list[float]:
    reply = StreamedReply()
    for now, choice in enumerate(choices):
        reply.feed(f"data: {json.dumps({'choices': [choice]})}\n\n".encode(), now)
    return reply.chunk_times


def test_chunks_that_only_open_or_end_a_message_are_no_tokens():
    assert chunk_times(CHAT) == [1, 2, 3]


def test_an_answer_that_ends_at_once_is_timed_by_its_end():
    assert chunk_times([CHAT[0], CHAT[-1]]) == [1]


ERRORS = {
    b'{"error": {"message": "too long"}}': "too long",
    b'{"error": "too long"}': "too long",
    b'{"object": "error", "message": "too long"}': "too long",
    b'{"detail": "Not Found"}': '{"detail": "Not Found"}',
    b"Bad Gateway \xff": "Bad Gateway \ufffd",
}


@pytest.mark.parametrize("body", ERRORS)
def test_a_refusals_reason_is_found_or_its_whole_body_shown(body):
    assert error_message(body) == ERRORS[body]


@pytest.mark.parametrize("url", ["http://h:80/a", "http://h:80/a/", "http://h:80/a/v1", "http://h:80/a/v1/"])
def test_an_address_may_end_in_v1(url):
    assert Target(url, "good").root == "http://h:80/a"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http://h:port", "ftp://h", "http://[::1", "http://a..b", "http://user:pass@h"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="base_url"):
        Target(url, "good")


# What comes back


def test_tokens_are_the_servers_own_count_and_every_chunk_has_a_time(server):
    (outcome,) = send(server, count=1, max_tokens=4).outcomes
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.counted) == (7, 4, False)
    assert len(outcome.chunk_times) == 4
    assert [outcome.start_s, *outcome.chunk_times] == sorted([outcome.start_s, *outcome.chunk_times])


def test_without_usage_ids_and_chunks_are_counted(server):
    (outcome,) = send(server, count=1, max_tokens=4, model="countless").outcomes
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.counted) == (3, 4, True)


def test_no_more_requests_are_in_flight_than_the_concurrency(server):
    finished = send(server, count=12, concurrency=3)
    assert server.most == finished.peak == 3
    assert kinds(finished) == [None] * 12


def test_connections_serve_one_request_after_another(server):
    send(server, count=9, concurrency=2)
    assert len(server.ports) == 2


def test_the_body_asks_for_a_stream_with_usage_and_the_options_given(server):
    send(server, count=1, ignore_eos=False, temperature=0.5)
    send(server, count=1)
    assert server.bodies[0] == {
        "model": "good", "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0.5, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert server.bodies[1]["ignore_eos"] is True


def test_failed_requests_are_counted_by_kind_and_the_others_complete(server):
    report = summarise(send(server, count=6, concurrency=1, model="flaky"), 1)
    assert (report.completed, report.failed) == (3, 3)
    (error,) = report.errors
    assert (error.kind, error.count) == ("HTTP 503", 3)
    assert error.example == "too busy"


FAILURES = {
    "cut": "stream cut", "unfinished": "stream cut", "angry": "error event", "dying": "error event",
    "silent": "empty stream", "locked": "HTTP 401", "stuck": "timeout",
}  # fmt: skip


@pytest.mark.parametrize("model", FAILURES)
def test_a_failure_has_its_kind(server, model):
    assert kinds(send(server, count=2, model=model, timeout_s=0.3 if model == "stuck" else 30)) == [FAILURES[model]] * 2


def test_a_server_that_is_not_there_is_a_failure_of_each_request(server):
    server.url = "http://127.0.0.1:9"
    assert kinds(send(server, count=2)) == ["no connection"] * 2


def test_a_server_without_tls_is_no_connection_for_https(server):
    server.url = server.url.replace("http", "https")
    (outcome,) = send(server, count=1).outcomes
    assert outcome.failure.kind == "no connection"
    assert "SSL" in outcome.failure.detail


EVENTS = b'data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n'
ANSWERS = {
    "nothing": (b"", "connection lost"),
    "another protocol": (b"SSH-2.0-OpenSSH_9\r\n\r\n", "bad HTTP"),
    "another address": (b"HTTP/1.1 302 Found\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n", "HTTP 302"),
    "less than announced": (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + EVENTS[:40], "stream cut"),
    "no JSON": (b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS.replace(b"]", b"", 1), "malformed event"),
    "all, and its end is that of the connection": (b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS, None),
    "all, and no last chunk": (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + EVENTS, None),
}


@pytest.mark.parametrize("said", ANSWERS)
def test_what_a_server_says_before_it_hangs_up_decides_the_outcome(said):
    answer, kind = ANSWERS[said]
    with saying(answer) as server:
        assert kinds(send(server, count=1, timeout_s=20)) == [kind]


def test_the_key_is_sent_as_bearer_token(server):
    assert kinds(send(server, count=1, model="locked", api_key=KEY)) == [None]


def test_the_key_is_in_neither_the_targets_text_nor_its_options():
    target = Target("http://h", "good", api_key=KEY)
    assert KEY not in f"{target} {target.options()}"


def test_a_key_that_no_header_can_hold_is_refused_unseen():
    with pytest.raises(ConfigError, match="api_key") as error:
        Target("http://h", "good", api_key=f"{KEY}\n")
    assert KEY not in str(error.value)


# Definitions


def outcome(start=0.0, chunks=(1.0,), output=1, failure=None, due=0.0) -> Outcome:
    return Outcome(due, start, tuple(chunks), 10, output, output, False, failure)


def test_a_percentile_lies_on_the_line_between_its_neighbours():
    assert spread([50.0, 10.0, 40.0, 20.0, 30.0]) == Spread(30, 30, pytest.approx(46), pytest.approx(49.6))
    assert spread([4.0]) == Spread(4, 4, 4, 4)


def test_latencies_follow_their_definitions():
    done = outcome(start=1.0, chunks=[3.0, 4.0, 7.0], output=5, due=0.5)
    report = summarise(Finished((done,), 8.0, 1, 0.1), None)
    assert report.ttft_s.mean == 2
    assert report.tpot_s.mean == 1  # four tokens after the first, in four seconds
    assert report.itl_s.mean == 2
    assert report.e2e_s.mean == 6
    assert report.max_send_delay_s == 0.5


def test_rates_count_completed_requests_over_the_whole_run():
    failed = outcome(chunks=(), output=3, failure=Failure("timeout", "x"))
    report = summarise(Finished((outcome(output=30), failed), 10.0, 2, 0.1), 2)
    assert (report.requests_per_s, report.output_tokens_per_s, report.total_tokens_per_s) == (0.1, 3.0, 4.0)


def test_one_token_has_no_time_per_token():
    assert summarise(Finished((outcome(),), 1.0, 1, 0.1), None).tpot_s is None


# The command


def test_the_command_prints_options_and_a_run_for_each_concurrency(server):
    result = run_cli(
        "--base-url", f"{server.url}/v1", "--num-prompts", 4, "--input-len", 5, "--output-len", 3, "--concurrency",
        "1,2", "--api-key", KEY, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"model": "good", "input_len": 5, "concurrency": [1, 2], "base_url": server.url}.items() <= report.items()
    assert [(run["concurrency"], run["completed"], run["output_tokens"]) for run in report["runs"]] == [
        (1, 4, 12),
        (2, 4, 12),
    ]
    assert set(report["runs"][0]["ttft_s"]) == {"mean", "median", "p90", "p99"}
    assert "between chunks" in result.stderr
    assert KEY not in result.output


def test_latencies_are_drawn(server, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "latency.svg"
    result = run_cli("--base-url", server.url, "--num-prompts", 1, "--input-len", 5, "--output-len", 3, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_chat_sends_random_words_as_a_message(server):
    result = run_cli("--base-url", server.url, "--endpoint", "chat", "--num-prompts", 1, "--input-len", 5)
    assert result.exit_code == 0, result.output
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 5


def test_when_nothing_succeeds_the_server_and_the_reason_are_named(server):
    result = run_cli("--base-url", server.url, "--model", "unfinished", "--num-prompts", 2, "--concurrency", "1,2")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"base_url={server.url}: none of 2 requests succeeded (2 x stream cut")


def test_a_server_without_models_is_named():
    result = run_cli("--base-url", "http://127.0.0.1:9")
    assert isinstance(result.exception, ConfigError)
    assert "--model" in str(result.exception)


@pytest.mark.parametrize("options", [("--concurrency", "0"), ("--plot", "/no/such/folder/x.svg"), ("--timeout", "0")])
def test_impossible_options_are_refused_before_anything_is_sent(server, options):
    assert isinstance(run_cli("--base-url", server.url, *options).exception, ConfigError)
    assert server.bodies == []
