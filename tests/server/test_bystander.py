"""Whatever attackers send, a well-behaved client beside them is answered rightly, and memory stays bounded.

Server and router are processes of their own, so that their memory is theirs alone.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.disaggregation.servers import Started, ended, start
from tests.server.running import ascii_folder, expected
from tests.server.small import LIMITS

PATIENCE = 120.0  # against hangs
HTTP_GROWTH, CORE_GROWTH = 64 << 20, 48 << 20  # the most that a process may grow under one attack
ROUNDS = 4
MOST = LIMITS.max_connections or 0
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
UNREAD = (
    b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 8
)  # more than kernel and server hold for a client before the answer halts
SMALL = "import sys; from tests.server import small; getattr(small, sys.argv[1])(sys.argv[2])"


@dataclass(frozen=True)
class Target:
    """Where attackers and the bystander connect to, and the processes whose memory is watched."""

    port: int
    http: tuple[int, ...]
    core: int
    idle_files: int = 0

    @property
    def num_files(self) -> int:
        """Files and connections that the process connected to has open."""
        return len(list(Path(f"/proc/{self.http[-1]}/fd").iterdir()))

    def connect(self, sent: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        opened = socket.socket()
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.settimeout(PATIENCE)
        opened.connect(("127.0.0.1", self.port))
        opened.sendall(sent)
        return opened

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and answer, over a connection of its own."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as client:
            headers = {"Connection": "close", "Content-Type": "application/json"}
            client.request("GET" if body is None else "POST", path, body, headers)
            answer = client.getresponse()
            return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def server_process() -> Iterator[Started]:
    started = start(SMALL, ["server", ascii_folder()])
    with ended(started):
        started.url()
        yield started


@pytest.fixture(scope="module")
def server(server_process: Started) -> Target:
    http = server_process.process.pid
    (core,) = Path(f"/proc/{http}/task/{http}/children").read_text().split()
    return warm(Target(urlsplit(server_process.url()).port or 0, (http,), int(core)))


@pytest.fixture(scope="module")
def router(server: Target, server_process: Started) -> Iterator[Target]:
    started = start(SMALL, ["router", server_process.url()])
    with ended(started):
        port = urlsplit(started.url()).port or 0
        yield warm(Target(port, (*server.http, started.process.pid), server.core))


def warm(target: Target) -> Target:
    """The first requests of a process import and allocate what later ones use again."""
    be_served(target)
    form = {"type": "json_object"}
    target.ask("/v1/completions", json_bytes(prompt="abc", max_tokens=2, response_format=form))
    target.ask("/tokenize", json_bytes(prompt="a" * 60_000))
    return replace(target, idle_files=target.num_files)


def json_bytes(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def be_served(target: Target) -> None:
    """One turn of the bystander."""
    status, answer = target.ask("/v1/completions", json_bytes(prompt="abc", max_tokens=3, temperature=0))
    assert (status, answer["choices"][0]["text"]) == (200, expected("abc", 3))
    assert target.ask("/health")[0] == 200


def memory(process: int, name: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@contextmanager
def bounded_memory(target: Target) -> Iterator[None]:
    """No process of the target holds more within the block than it did before, but for a bound."""
    processes = (*((process, HTTP_GROWTH) for process in target.http), (target.core, CORE_GROWTH))
    before = {process: memory(process, "VmRSS") for process, _ in processes}
    for process in before:
        Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak starts again
    yield
    for process, most in processes:
        assert memory(process, "VmHWM") - before[process] < most


def withstand(target: Target, *attacks: Callable[[], object]) -> list[Any]:
    """The bystander is served during attacks and after them; what attackers got."""
    with bounded_memory(target), ThreadPoolExecutor(len(attacks)) as pool:
        running = [pool.submit(attack) for attack in attacks]
        rounds = 0
        while rounds < ROUNDS or not all(each.done() for each in running):
            be_served(target)
            rounds += 1
        return [each.result() for each in running]


def send(target: Target, begin: bytes, part: bytes, megabytes: int) -> bytes:
    """Send without end, at most some megabytes; the beginning of what comes back."""
    with closing(target.connect(begin)) as opened:
        with suppress(OSError):
            for _ in range(megabytes):
                opened.sendall(part * ((1 << 20) // len(part)))
        with suppress(OSError):
            return opened.recv(64)
    return b""


@pytest.fixture(params=["server", "router"])
def either(request: pytest.FixtureRequest) -> Target:
    """Both are attacked in the same way."""
    target: Target = request.getfixturevalue(request.param)
    return target


def test_beside_endless_headers(either: Target):
    withstand(either, *[lambda: send(either, b"GET / HTTP/1.1\r\nx: ", b"a" * 64, 40)] * 6)


def test_many_short_headers_are_too_many(either: Target):
    head = b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 600 + b"\r\n"  # fewer bytes than a head may have
    assert b" 431 " in send(either, head, b"", 0)


def test_beside_many_requests_at_once_on_each_connection(either: Target):
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    withstand(either, *[lambda: send(either, request, request, 1)] * 12)


COUNT = 2_000_000
BODIES: dict[str, tuple[str, bytes]] = {
    "lists": ("/v1/chat/completions", b'{"messages":[' + b"[]," * COUNT + b"1]}"),
    "unknown names": ("/v1/completions", b"{" + b",".join(b'"%d":1' % n for n in range(COUNT // 5)) + b"}"),
    "ids": ("/detokenize", b'{"tokens":[' + b"1," * (3 * COUNT) + b"1]}"),
    "messages": ("/v1/chat/completions", b'{"messages":[' + b'{"role":"user","content":"a"},' * 200_000 + b"1]}"),
    "levels": ("/v1/completions", b'{"prompt":' + b"[" * COUNT + b"]" * COUNT + b"}"),
    "tools": ("/v1/chat/completions", b'{"tools":[' + b'{"function":{"name":"f"}},' * 200_000 + b"1]}"),
    "texts": ("/v1/completions", b'{"prompt":[' + b'"",' * COUNT + b'""]}'),
    "arguments": (
        "/v1/chat/completions",
        json_bytes(messages=[{"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "[" + "[]," * COUNT + "1]"}}]}]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES.keys())
def test_beside_large_bodies(server: Target, path: str, body: bytes):
    answers = withstand(server, *[lambda: server.ask(path, body)] * 2)
    assert {status for status, _ in answers} == {400}


def test_beside_large_bodies_through_a_router(router: Target):
    withstand(router, *(lambda case=case: router.ask(*case) for case in list(BODIES.values())[:3]))


def test_a_router_holds_a_long_body_once(router: Target):
    long, process = json_bytes(prompt="a" * (15 << 20)), router.http[-1]
    before = memory(process, "VmRSS")
    Path(f"/proc/{process}/clear_refs").write_text("5")
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(router.ask, "/v1/completions", long) for _ in range(4)]
        be_served(router)
        assert {answer.result()[0] for answer in answers} == {400}
    # four bodies with an eighth to spare each, and pieces on their way; held twice they are nine
    assert memory(process, "VmHWM") - before < 7 * len(long)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_beside_texts_that_take_long_to_tokenise(server: Target, path: str):
    long, longest = (json_bytes(prompt="hello, " * count) for count in (600_000, 9_000))
    withstand(server, *[lambda: server.ask(path, long)] * 2, *[lambda: server.ask(path, longest)] * 8)


def schema(form: Any) -> bytes:
    wanted = {"type": "json_schema", "json_schema": {"schema": form}}
    return json_bytes(prompt="abc", max_tokens=4, n=2, response_format=wanted)


def named(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


GRAMMARS: dict[str, list[Any]] = {
    "patterns that must all hold": [{"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(200)]}],
    "many optional names": [{**named(10_000), "additionalProperties": False}],
    "many choices": [{"anyOf": [named(n) for n in range(300)]}],
    "ambiguous patterns": [{"type": "string", "pattern": p} for p in ("(a|a)*(a|aa)*b", "((a{1,1000}){1,1000}){1,99}")],
    "many different ones": [{"type": "string", "pattern": "a" * n} for n in range(1, 9)],
}


@pytest.mark.parametrize("forms", GRAMMARS.values(), ids=GRAMMARS.keys())
def test_beside_grammars(server: Target, forms: list[Any]):
    bodies = [schema(form) for form in forms] * (3 if len(forms) == 1 else 1)
    withstand(server, *(lambda body=body: server.ask("/v1/completions", body) for body in bodies))


def test_beside_clients_that_do_not_read(either: Target):
    def attack() -> None:
        readers = []
        for _ in range(2 * MOST):
            with suppress(OSError):
                readers.append(either.connect(UNREAD, 4096))
                readers[-1].recv(1)  # so that it is being answered
        time.sleep(0.2)
        for each in readers:
            each.close()

    withstand(either, attack)


def test_a_client_that_does_not_read_is_let_go(server: Target):
    readers = [server.connect(UNREAD, 4096) for _ in range(20)]
    until(lambda: server.num_files >= server.idle_files + 20)
    until(lambda: server.num_files <= server.idle_files + 10)  # the router, if there is one, keeps some connections
    for each in readers:
        each.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_beside_streams_that_nobody_reads(either: Target):
    body = json_bytes(prompt="abc", max_tokens=200, n=8, logprobs=20, stream=True)

    def attack() -> None:
        with closing(either.connect(HEAD % len(body) + body, 4096)):
            time.sleep(1.0)

    withstand(either, *[attack] * 3)


BEGUN = {
    "nothing": b"",
    "a header": b"GET / HTTP/1.1\r\nx: ",
    "a body": HEAD % 9999 + b"{",
}


@pytest.mark.parametrize("sent", BEGUN.values(), ids=BEGUN.keys())
def test_beside_clients_that_take_their_time(either: Target, sent: bytes):
    def attack() -> None:
        opened = []
        for _ in range(300):
            with suppress(OSError):
                opened.append(either.connect(sent))
            time.sleep(0.002)
        for _ in range(3):
            time.sleep(0.1)
            for each in opened:
                with suppress(OSError):
                    each.sendall(b" " if sent else b"")
        for each in opened:
            each.close()

    withstand(either, attack)


def test_beside_requests_that_ask_for_as_much_as_they_may(server: Target):
    most = json_bytes(
        prompt="abc", max_tokens=40, n=16, best_of=16, logprobs=20, stop=["x" * 900 + str(n) for n in range(64)],
        logit_bias={str(n % 97): -1 for n in range(97)}, stop_token_ids=[96] * 256,
    )  # fmt: skip
    many = json_bytes(prompt="abc", logit_bias={str(n): 1 for n in range(200_000)})
    long = json_bytes(prompt="abc", stop=["x" * (4 << 20)])
    answers = withstand(server, *(lambda body=body: server.ask("/v1/completions", body) for body in (most, many, long)))
    assert [status for status, _ in answers][:2] == [200, 400]


def test_the_completions_of_two_requests_do_not_keep_a_bystander_waiting_until_they_end(server: Target):
    many = json_bytes(prompt="abc", max_tokens=200, n=16, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        attacks = [pool.submit(server.ask, "/v1/completions", many) for _ in range(2)]
        until(lambda: [each["status"] for each in server.ask("/internal/state")[1]["requests"]].count("running") == 16)
        be_served(server)
        assert not any(attack.done() for attack in attacks)
        assert [attack.result()[0] for attack in attacks] == [200, 200]


def test_the_core_is_the_one_that_was_started(server: Target):
    assert server.ask("/internal/state")[1]["restarts"] == 0
