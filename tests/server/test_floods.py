"""Clients that send too much, too many or too slowly are refused, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from threading import Event
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import ValidationError

from longspan.errors import ConfigError, ContextOverflow, QueueFull, RequestError
from longspan.server import connections as connections_module
from longspan.server.bodies import JsonBounds
from longspan.server.chat import ChatBody
from longspan.server.completions import CompletionBody
from longspan.server.connections import connections_allowed
from longspan.server.options import HttpLimits, ServeOptions
from longspan.server.text import Text
from tests.server.running import PATIENCE, Running, ascii_tokenizer, expected, running
from tests.server.test_errors import refused

LIMITS = HttpLimits(
    max_header_bytes=8 << 10, header_seconds=1.0, stall_seconds=1.0, min_body_rate=100, linger_seconds=1.0,
    max_connections=12,
)  # fmt: skip
TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ServeOptions(port=0, served_model_name="tiny", max_body_bytes=16 << 20, http=LIMITS)
    with running(options=options) as started:
        yield started


def connect(server: Running, sent: bytes = b"") -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", server.server.port), timeout=PATIENCE)
    opened.sendall(sent)
    return opened


def answered(opened: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that ends with the connection; (0, {}) for a connection closed without one."""
    received = b""
    with suppress(ConnectionResetError):
        while part := opened.recv(1 << 16):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)) if received else (0, {})


def post(body: bytes = b"", *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def flood(opened: socket.socket, part: bytes, server: Running) -> None:
    """Send until nobody takes it, at most a megabyte; a bystander is served in between."""
    with suppress(ConnectionResetError, BrokenPipeError):
        for number in range(64):
            opened.sendall(part * ((16 << 10) // len(part)))
            if number == 1:
                assert server.complete("abc", 3)["choices"][0]["text"] == expected("abc", 3)


@pytest.mark.parametrize("part", [b"a" * 64, b"name: value\r\n"], ids=["one endless", "endlessly many"])
def test_endless_headers_are_refused_before_the_key_is_looked_at(server: Running, part):
    with closing(connect(server, b"GET / HTTP/1.1\r\nx: ")) as attacker:
        flood(attacker, part, server)
        status, body = answered(attacker)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


def test_an_endless_request_line_is_refused(server: Running):
    with closing(connect(server, b"GET /")) as attacker:
        flood(attacker, b"a" * 64, server)
        assert answered(attacker)[0] == 431


@pytest.mark.parametrize("part", ["0\r\nx: ", "1;"], ids=["trailer", "chunk extension"])
def test_what_is_neither_headers_nor_body_is_bounded_like_headers(server: Running, part):
    with closing(connect(server, post(part.encode(), "transfer-encoding: chunked"))) as attacker:
        flood(attacker, b"a" * 64, server)
        assert answered(attacker)[0] == 431


def test_headers_within_the_bound_are_served(server: Running):
    answer = server.client.get("/v1/models", headers={"x-long": "a" * (6 << 10)})
    assert answer.status_code == 200


def test_what_is_no_http_gets_an_error_of_the_usual_shape(server: Running):
    with closing(connect(server, b"\x16\x03\x01 this is TLS\r\n\r\n")) as client:
        status, body = answered(client)
    assert (status, body["error"]["code"]) == (400, "invalid_http")


@pytest.mark.parametrize(
    ("sent", "what"),
    [(b"GET / HTTP/1.1\r\nx", "headers"), (post(b"{", "content-length: 100"), "body")],
    ids=["headers", "body"],
)
def test_a_request_that_does_not_come_to_its_end_is_timed_out(server: Running, sent, what):
    with closing(connect(server, sent)) as attacker:
        status, body = answered(attacker)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert body["error"]["message"].startswith(what)


def test_a_body_that_trickles_is_timed_out(server: Running):
    with closing(connect(server, post(b"{", "content-length: 1000"))) as attacker, suppress(OSError):
        for _ in range(int(PATIENCE / 0.2)):
            attacker.sendall(b" ")
            attacker.settimeout(0.2)
            with suppress(TimeoutError):
                assert b" 408 " in attacker.recv(1 << 16)
                return
    pytest.fail("it may trickle for ever")


def test_a_slow_body_that_keeps_its_pace_is_served(server: Running):
    body = b'{"prompt": "abc", "max_tokens": 3, "temperature": 0' + b" " * 1000 + b"}"
    with closing(connect(server, post(b"", f"content-length: {len(body)}", "connection: close"))) as client:
        for begin in range(0, len(body), 150):
            time.sleep(0.3)
            client.sendall(body[begin : begin + 150])
        status, answer = answered(client)
    assert (status, answer["choices"][0]["text"]) == (200, expected("abc", 3))


def test_one_connection_too_many_costs_that_which_waits_longest_its_place(server: Running, caplog):
    most = LIMITS.max_connections or 0
    with caplog.at_level(logging.WARNING, "longspan.server"):
        idle = [connect(server) for _ in range(2 * most)]
        try:
            # a new connection: one that was kept open between two requests may be the one that is closed
            body = {"prompt": "abc", "max_tokens": 3, "temperature": 0}
            answer = httpx.post(f"http://127.0.0.1:{server.server.port}/v1/completions", json=body, timeout=60)
            assert answer.json()["choices"][0]["text"] == expected("abc", 3)
            assert answered(idle[0]) == (0, {})
        finally:
            for opened in idle:
                opened.close()
    assert f"{most} connections are open" in caplog.text
    assert "ulimit -n" in caplog.text


@pytest.mark.parametrize(("files", "connections"), [(1024, 640), (200, 50), (1 << 20, 8192), (-1, 8192)])
def test_connections_leave_a_reserve_of_open_files(monkeypatch, files, connections):
    monkeypatch.setattr(connections_module.resource, "getrlimit", lambda _: (files, files))
    assert connections_allowed(HttpLimits()) == connections
    assert connections_allowed(HttpLimits(max_connections=7)) == 7


def test_an_impossible_limit_is_refused():
    with pytest.raises(ConfigError, match=r"^header_seconds=0: "):
        HttpLimits(header_seconds=0)


MANY = (1 << 18) + 1
UNREADABLE = {"type": "string", "pattern": "(" * 5000}
FORMS: list[tuple[str, bytes, str]] = [
    ("/v1/chat/completions", b'{"messages": [' + b"[]," * MANY + b"1]}", "lists and objects"),
    ("/v1/completions", b'{"logit_bias": {' + b",".join(b'"%d":1' % key for key in range(MANY)) + b"}}", "names"),
    ("/v1/completions", b"{" + b",".join(b'"%d":1' % key for key in range(MANY)) + b"}", "named fields"),
    ("/detokenize", b'{"tokens": [' + b"1," * 4 * MANY + b"1]}", "values"),
    ("/v1/completions", b'{"prompt": [' + b'"",' * 4 * MANY + b"1]}", "values"),
    ("/v1/chat/completions", b'{"tools": ' + b"[" * 200 + b"]" * 200 + b"}", "levels"),
]


@pytest.mark.parametrize(("path", "body", "bound"), FORMS, ids=[bound for *_, bound in FORMS])
def test_a_body_is_counted_before_it_is_decoded(server: Running, path, body, bound):
    answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
    message = refused(answer)["message"]
    assert message.startswith("body=[")
    assert "holds more than" in message


def test_what_is_in_texts_does_not_count():
    tight = JsonBounds(values=4, containers=2, names=4, depth=1)
    text = r'[[[{{{,,,:::"\"\\' * 50
    tight.check([msgspec.json.encode({"prompt": text, "stop": text})])
    tight.check([msgspec.json.encode({text: "\\"})])
    with pytest.raises(RequestError, match="values"):
        tight.check([msgspec.json.encode({"prompt": [text, "\\", 1, 2, 3]})])


def test_the_arguments_of_all_tool_calls_have_the_bounds_of_one_body(server: Running):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "[" + "[]," * 60_000 + "1]"}}] * 5
    error = refused(
        server.post("/v1/chat/completions", {"messages": [*TALK, {"role": "assistant", "tool_calls": calls}]})
    )
    assert error["param"] == "messages.tool_calls"


@pytest.mark.parametrize("arguments", ["[" * 100_000, '"', "9" * 5000], ids=["deep", "a quote", "digits"])
def test_arguments_that_cannot_be_read_stay_a_text(server: Running, arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    body = {"messages": [*TALK, {"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("place", ["message", "tools", "template"])
def test_the_deepest_body_that_is_taken_is_answered(server: Running, place):
    deep = msgspec.json.decode(b'{"a":' * 120 + b"1" + b"}" * 120)
    body: dict[str, Any] = {"messages": [{**TALK[0], **({"extra": deep} if place == "message" else {})}]}
    if place == "tools":
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    if place == "template":
        body["chat_template_kwargs"] = {"extra": deep}
    assert server.post("/v1/chat/completions", {**body, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": "a", **dict.fromkeys("unknown", 1)}),
        (ChatBody, {"messages": [{}] * 3}),
        (ChatBody, {"messages": [{"role": "user", "content": [1, 2, 3]}]}),
        (ChatBody, {"messages": TALK, "stream_options": dict.fromkeys("unknown", 1)}),
    ],
    ids=["unknown", "messages", "parts", "nested"],
)
def test_errors_are_not_counted_beyond_the_first(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.of(body, 0)
    places = {error["loc"][:2] for error in caught.value.errors()}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", TALK * 40_000), ("messages", [{"role": "user", **dict.fromkeys(map(str, range(100)), 1)}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]),
        ("tools", [{"function": {"name": "f"}}] * 2000), ("metadata", dict.fromkeys(map(str, range(100)), "")),
        ("chat_template_kwargs", dict.fromkeys(map(str, range(100)), 1)), ("modalities", ["text"] * 100),
    ],
    ids=["messages", "fields", "parts", "tools", "metadata", "options", "modalities"],
)  # fmt: skip
def test_lists_and_objects_have_a_largest_length(field, value):
    with pytest.raises(ValidationError, match=r"at most|more than"):
        ChatBody.of(
            {"messages": TALK, **({"messages": TALK * 70_000} if value == TALK * 40_000 else {field: value})}, 0
        )


@pytest.mark.parametrize(
    "body",
    [
        {"k" * 100_000: 1}, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, {"prompt": "a", "model": "m" * 100_000},
        {"prompt": "a", "stream_options": {"k" * 100_000: 1}},
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": UNREADABLE}}},
    ],
    ids=["field", "bias", "model", "nested", "pattern"],
)  # fmt: skip
def test_a_long_name_is_not_echoed_whole(server: Running, body):
    answer = server.post("/v1/completions", body)
    assert len(refused(answer, 404 if "model" in body else 400)["message"]) < 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a" * 70_000}), ("/v1/completions", {"prompt": ["a", "é" * 40_000]}),
        ("/tokenize", {"prompt": "a" * 70_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 70_000}]}),
    ],
    ids=["completion", "several", "tokenize", "chat"],
)  # fmt: skip
def test_a_text_that_can_never_fit_is_refused_by_its_length(server: Running, path, body):
    error = refused(server.post(path, body))
    assert error["code"] == "context_length_exceeded"
    assert "at most 65536 bytes" in error["message"]


def test_a_text_of_too_many_characters_is_not_copied_to_count_its_bytes():
    class Uncopied(str):
        def encode(self, *_: Any, **__: Any) -> bytes:
            pytest.fail("it is copied")

    with pytest.raises(ContextOverflow, match="at least 65537 bytes"):
        asyncio.run(Text(ascii_tokenizer(), 512).encode(Uncopied("a" * 65_537)))


def test_more_ids_than_the_model_takes_are_not_decoded(server: Running):
    assert "exceed max_model_len=512" in refused(server.post("/detokenize", {"tokens": [1] * 513}))["message"]
    assert server.post("/detokenize", {"tokens": [1] * 512}).status_code == 200


def test_a_text_as_long_as_the_model_takes_is_encoded():
    text = Text(ascii_tokenizer(), 20_000)
    assert text.max_bytes == 100_000  # the longest token has five bytes
    assert len(asyncio.run(text.encode("a" * 100_000))) == 100_000
    with pytest.raises(ContextOverflow):
        asyncio.run(text.encode("a" * 100_001))


def test_a_short_text_does_not_wait_for_long_ones():
    async def order() -> list[str]:
        text, done = Text(ascii_tokenizer(), 1 << 20), []

        async def encode(name: str, prompt: str) -> None:
            await text.encode(prompt)
            done.append(name)

        await asyncio.gather(*[encode("long", "a" * 200_000) for _ in range(4)], encode("short", "abc"))
        return done

    assert asyncio.run(order()).index("short") < 2


def test_long_texts_beyond_those_that_may_wait_are_refused():
    async def run() -> list[BaseException | None]:
        text, gate = Text(ascii_tokenizer(), 512), Event()
        calls = [asyncio.create_task(text.run(1 << 20, gate.wait)) for _ in range(65)]
        await asyncio.sleep(0)
        await text.encode("a short one")
        gate.set()
        await asyncio.wait(calls)
        return [call.exception() for call in calls]

    *others, last = asyncio.run(run())
    assert isinstance(last, QueueFull)
    assert not any(others)


def test_what_is_being_tokenised_counts_as_waiting():
    with running(options=ServeOptions(port=0, max_queued_requests=2)) as server:
        gate = Event()
        room = server.engine.setup.config.scheduler.max_num_seqs + 2
        calls = [
            asyncio.run_coroutine_threadsafe(server.service.text.run(0, gate.wait), server.loop) for _ in range(room)
        ]
        while server.service.text.num_pending < room:
            time.sleep(0.01)
        for path in ("/v1/completions", "/tokenize"):
            assert refused(server.post(path, {"prompt": "a"}), 429)["code"] == "queue_full"
        gate.set()
        for call in calls:
            call.result(PATIENCE)
        server.complete("abc", 2)


def test_the_largest_body_follows_from_the_model_unless_it_is_given(server: Running):
    assert server.service.max_body_bytes == 16 << 20
    assert replace(server.service, options=ServeOptions()).max_body_bytes == 2 << 20
    for max_model_len, most in ((200_000, 6 << 20), (1 << 22, 64 << 20)):
        text = Text(ascii_tokenizer(), max_model_len)
        found = replace(server.service, options=ServeOptions(), text=text).max_body_bytes
        assert found == min(6 * text.max_bytes, 64 << 20) <= most


def test_a_body_that_is_not_declared_as_json_is_refused(server: Running):
    asked = "send the header Content-Type: application/json"
    for headers, message in (
        ({"content-type": "text/plain"}, f"Content-Type='text/plain': is not JSON's; {asked}"),
        ({}, f"Content-Type: is missing; {asked}"),
        (
            {"content-type": "application/x-www-form-urlencoded"},
            "Content-Type='application/x-www-form-urlencoded': is not JSON's; "
            f"{asked} (curl -d sends a form's unless it is told -H 'Content-Type: application/json')",
        ),
    ):
        answer = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        error = refused(answer, 415)
        assert (error["param"], error["message"]) == ("Content-Type", message)


def test_a_compressed_body_is_refused_by_name(server: Running):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = server.client.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert refused(answer, 415)["message"] == "Content-Encoding='gzip': is not read; send the body as it is"
