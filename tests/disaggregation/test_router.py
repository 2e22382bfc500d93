"""The router: which instance it chooses, and what it does when one fails. The instances are fakes."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from longspan.config import TransferConfig
from longspan.disaggregation.signature import PREFILL_HEADER, SIGNATURE_HEADER, named_peers, token_digest
from longspan.errors import ConfigError, RequestError
from longspan.server import middleware
from longspan.server.router.balance import Balance, blocks_of
from longspan.server.router.instances import Instances
from longspan.server.router.proxy import RouteOptions, prompt_of, route

FORMAT = {
    "protocol": 1, "model": "m", "weights": "w", "dtype": "float32", "kv_cache_dtype": "auto", "kv_factor": 2,
    "row_bytes": 256,
}  # fmt: skip
BODY = {"prompt": "p" * 1000}
TOKEN = "a secret of some length"


class Fake:
    """A fake instance: reports its role and format, and records the requests that it receives."""

    def __init__(self, role: str, answer=None, token: str = TOKEN, peers=(), **differences: object) -> None:
        self.role, self.answer, self.asked = role, answer, []
        self.token, self.peers, self.paths, self.queries, self.bodies = token, peers, [], [], []
        self.format = {**FORMAT, **differences}
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/internal/peer", self._peer), Route("/{path:path}", self._asked, methods=["GET", "POST"])]
        )

    @property
    def address(self) -> str:
        """Its transfer address, as the router should report it."""
        return f"tcp://127.0.0.1:{1 + id(self) % 1000}"

    async def _peer(self, _: Request) -> JSONResponse:
        info = {
            "role": self.role, "address": self.address.replace("127.0.0.1", "0.0.0.0"), "format": self.format,
            "token": token_digest(self.token), "prefill_peers": self.peers,
        }  # fmt: skip
        return JSONResponse({"info": info, "model": "tiny", "waiting": 0, "running": 0})

    async def _asked(self, request: Request):
        self.paths.append(request.scope["raw_path"].decode())
        self.queries.append(request.scope["query_string"].decode())
        self.bodies.append(await request.body())
        self.asked.append((dict(request.headers), await request.json() if self.bodies[-1] else None))
        return self.answer() if self.answer else JSONResponse({"by": self.url})


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(20)


@contextmanager
def fakes(*instances: Fake) -> Iterator[tuple[Fake, ...]]:
    if not instances:
        yield ()
        return
    with served(instances[0].app()) as url, fakes(*instances[1:]) as others:
        instances[0].url = url
        yield (instances[0], *others)


@contextmanager
def routing(*instances: Fake, more: tuple[str, ...] = (), token: str = TOKEN, **options) -> Iterator[httpx.Client]:
    """A router in front of instances. Raises the error if it does not start."""
    started, found, failed = Event(), [], []
    prefill = [fake.url for fake in instances if fake.role == "prefill"]
    decode = [*(fake.url for fake in instances if fake.role == "decode"), *more]

    def ready(server: uvicorn.Server) -> None:
        found.append(server)
        started.set()

    def run() -> None:
        try:
            options.setdefault("wait_seconds", 0)
            asyncio.run(route(Instances(prefill, decode, token), RouteOptions(port=0, **options), ready))
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    if failed:
        raise failed[0]
    port = found[0].servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
    found[0].should_exit = found[0].force_exit = True
    thread.join(20)


def test_a_decode_instance_gets_the_addresses_of_all_prefill_instances():
    with (
        fakes(Fake("prefill"), Fake("prefill"), Fake("decode")) as (first, second, decode),
        routing(first, second, decode) as client,
    ):
        forged = {PREFILL_HEADER: "tcp://evil:1", SIGNATURE_HEADER: "1.2"}
        assert client.post("/v1/completions", json=BODY, headers=forged).json()
        ((headers, body),) = decode.asked
        assert body == BODY
        assert set(headers[PREFILL_HEADER].split(",")) == {first.address, second.address}


def test_the_router_signs_the_addresses_and_the_body():
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode) as client:
        client.post("/v1/completions", json=BODY)
        ((headers, _),), (body,) = decode.asked, decode.bodies
        shared, other = (TransferConfig("decode", token=token) for token in (TOKEN, "another secret of that kind"))
        sent_headers = headers[PREFILL_HEADER], headers[SIGNATURE_HEADER]
        assert named_peers(shared, *sent_headers, body, time.time()) == (prefill.address,)
        for config, sent in ((other, body), (shared, body + b" ")):
            with pytest.raises(RequestError, match="no valid signature"):
                named_peers(config, *sent_headers, sent, time.time())


def test_configured_peers_are_sent_without_a_signature():
    with fakes(Fake("prefill", token="")) as (prefill,), fakes(Fake("decode", token="", peers=(prefill.address,))) as (
        decode,
    ), routing(prefill, decode, token="") as client:  # fmt: skip
        client.post("/v1/completions", json=BODY)
        ((headers, _),) = decode.asked
        assert headers[PREFILL_HEADER] == prefill.address
        assert SIGNATURE_HEADER not in headers


@pytest.mark.parametrize(
    ("theirs", "ours", "problem"),
    [
        (
            "",
            TOKEN,
            "than the prefill instance tcp.*or only one has any; .*same --transfer-token-file.*--prefill-peers tcp",
        ),
        (TOKEN, "", "does not know the prefill instance"),
        ("another secret of that kind", TOKEN, "has another transfer token than the router"),
    ],
    ids=["none there", "none here", "another"],
)
def test_the_router_does_not_start_if_a_decode_instance_would_refuse_its_addresses(theirs, ours, problem):
    with (
        fakes(Fake("prefill"), Fake("decode", token=theirs)) as both,
        pytest.raises(ConfigError, match=problem),
        routing(*both, token=ours),
    ):
        pass


def ask(client: httpx.Client, target: str, host: str, method: str = "POST") -> bytes:
    """The status line of the answer to a request that is sent exactly as given."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(
            f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        return connection.makefile("rb").readline()


@pytest.mark.parametrize("target", ["/version", "/docs", "/openapi.json"])
def test_the_host_header_does_not_change_the_forwarded_path(target):
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode, api_key="k") as client:
        assert b"200" in ask(client, target, "x/v1/completions?", "GET")
        assert decode.paths == [target]
        assert b"401" in ask(client, "/v1/completions", "x/health?")
        assert decode.paths == [target]


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/internal/state"), ("GET", "/internal/peer"), ("GET", "/metrics"), ("GET", "/v1/completions"),
        ("POST", "/v1/models"), ("PUT", "/v1/completions"), ("POST", "//internal/peer"), ("POST", "/v1/embeddings"),
        ("GET", "/version/"), ("POST", "/v1/completions/"),
    ],
)  # fmt: skip
def test_only_listed_paths_are_forwarded(method, target):
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode) as client:
        status = ask(client, target, "x", method)
        assert b"404" in status or b"405" in status
        assert not decode.paths


def test_the_answer_for_another_path_lists_the_forwarded_ones():
    with fakes(Fake("prefill"), Fake("decode")) as both, routing(*both) as client:
        problem = client.get("/metrics").json()["error"]["message"]
        assert "GET /metrics is nothing that the router forwards; it takes POST of /v1/completions" in problem


@pytest.mark.parametrize("name", ["org/model", "..%2F..%2Finternal%2Fpeer", "a%3Fb%23c", "../../internal/peer"])
def test_the_name_of_a_model_is_forwarded_as_one_path_segment(name):
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode) as client:
        ask(client, f"/v1/models/{name}?x=1", "x", "GET")
        assert decode.paths == ["/v1/models/" + name.replace("/", "%2F")]


def test_the_query_is_forwarded_unchanged():
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode) as client:
        ask(client, "/v1/models?a=b%20c&d", "x", "GET")
        assert (decode.paths, decode.queries) == (["/v1/models"], ["a=b%20c&d"])


def test_other_requests_are_forwarded_without_prefill_addresses():
    with fakes(Fake("prefill"), Fake("decode")) as both, routing(*both) as client:
        client.post("/tokenize", json=BODY)
        assert "x-longspan-prefill" not in both[1].asked[0][0]


def test_a_request_with_too_large_headers_is_not_forwarded():
    with fakes(Fake("prefill"), Fake("decode")) as (prefill, decode), routing(prefill, decode) as client:
        assert client.post("/tokenize", json=BODY, headers={"x-long": "a" * (200 << 10)}).status_code == 431
        assert not decode.asked


def test_another_decode_instance_serves_when_one_has_ended():
    prefill, first, second = Fake("prefill"), Fake("decode"), Fake("decode")
    with fakes(prefill, second), ExitStack() as opened:
        first.url = opened.enter_context(served(first.app()))
        with routing(prefill, first, second) as client:
            opened.close()  # before the router's next poll
            for _ in range(3):
                assert client.post("/v1/completions", json=BODY).json() == {"by": second.url}


def test_without_a_decode_instance_the_answer_is_503():
    prefill, decode = Fake("prefill"), Fake("decode")
    with fakes(prefill), ExitStack() as opened:
        decode.url = opened.enter_context(served(decode.app()))
        with routing(prefill, decode) as client:
            assert client.get("/health").status_code == 200
            opened.close()
            answer = client.post("/v1/completions", json=BODY)
            assert answer.status_code == 503
            assert "no decode instance is there" in answer.json()["error"]["message"]
            assert client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (Fake("decode", weights="v"), "weights .another model or revision.: the decode instance has v"),
        (Fake("decode", dtype="bfloat16"), "dtype: the decode instance has bfloat16, the prefill instance float32"),
        (Fake("decode", kv_cache_dtype="int8"), "kv_cache_dtype: the decode instance has int8"),
    ],
)
def test_instances_of_different_formats_are_refused_at_the_start(other, problem):
    with fakes(Fake("prefill"), other) as both, pytest.raises(ConfigError, match=problem), routing(*both):
        pass


def test_an_instance_under_the_wrong_role_is_refused():
    with (
        fakes(Fake("prefill"), Fake("prefill")) as (first, second),
        pytest.raises(ConfigError, match="is a prefill instance"),
        routing(first, more=(second.url,)),
    ):
        pass


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host"])
def test_an_invalid_url_is_refused(url):
    with pytest.raises(ConfigError, match="is no URL"):
        Instances([url], [])


def test_a_stream_that_is_interrupted_ends_with_an_error_event():
    async def events():
        yield b"data: {}\n\n"
        await asyncio.sleep(0.2)  # data that arrives together with the end would be lost
        raise RuntimeError

    def breaking():
        return StreamingResponse(events(), media_type="text/event-stream")

    with fakes(Fake("prefill"), Fake("decode", breaking)) as both, routing(*both) as client:
        text = client.post("/v1/completions", json=BODY).text
        assert text.startswith("data: {}\n\n")
        assert "the decode instance ended within the answer" in text
        assert text.endswith("data: [DONE]\n\n")


def test_a_body_that_an_instance_has_does_not_count_as_held_by_the_router(monkeypatch):
    monkeypatch.setattr(middleware, "_LEAST_HELD", 1)
    over = Event()

    async def events():
        yield b"data: {}\n\n"
        await asyncio.to_thread(over.wait, 30)

    fake = Fake("decode", lambda: StreamingResponse(events(), media_type="text/event-stream"))
    long = b'{"prompt":"' + b"a" * 1_000_000 + b'"}'
    with fakes(Fake("prefill"), fake) as both, routing(*both, max_body_bytes=1 << 20) as client, ExitStack() as opened:
        asking = [client.stream("POST", "/v1/completions", content=long) for _ in range(6)]
        assert [opened.enter_context(answer).status_code for answer in asking] == [200] * 6
        over.set()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (
            {"messages": [{"role": "user", "content": "é,"}], "prompt": "b"},
            b'[{"role": "user", "content": "\\u00e9,"}]',
        ),
        ({"messages": [], "prompt": "b"}, b'"b"'),
        ({"messages": None, "prompt": [1, 2]}, b"[1, 2]"),
        ({"prompt": ""}, b""),
        ({"stop": "a"}, b""),
    ],
)
def test_an_instance_is_chosen_by_messages_or_prompt_as_they_were_sent(body, found):
    for length in (1, 300):
        padded = json.dumps({"first": [{"prompt": "not this"}] * length, **body})
        assert prompt_of(padded.encode()) == (len(found), blocks_of(found))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt":', b"[" * 100_000, b'{"prompt":' + b"[" * 100_000])
def test_an_invalid_body_has_no_prompt(body):
    assert prompt_of(body) == (0, [])


def test_bodies_with_the_same_beginning_have_the_same_first_blocks():
    first, second = blocks_of(b"a" * 1000), blocks_of(b"a" * 600 + b"b" * 400)
    assert len(first) == 3
    assert [x == y for x, y in zip(first, second, strict=True)] == [True, True, False]


def test_a_prompt_goes_to_the_instance_that_has_seen_its_beginning():
    balance, prompt = Balance(10), b"a" * 4096
    balance.end("busy", balance.begin("busy", len(prompt), blocks_of(prompt)))
    assert balance.ranked(["idle", "busy"], len(prompt), blocks_of(prompt)) == ["busy", "idle"]


def test_a_prompt_goes_to_an_idle_instance_if_the_one_with_its_beginning_is_busy():
    balance, prompt, other = Balance(10), b"a" * 4096, b"b" * 9000
    balance.end("busy", balance.begin("busy", len(prompt), blocks_of(prompt)))
    balance.begin("busy", len(other), blocks_of(other))
    assert balance.ranked(["busy", "idle"], len(prompt), blocks_of(prompt)) == ["idle", "busy"]


def test_requests_spread_over_equal_instances():
    balance = Balance(10)
    chosen = []
    for _ in range(6):
        chosen.append(balance.ranked(["x", "y", "z"], 0, [])[0])
        balance.begin(chosen[-1], 0, [])
    assert sorted(chosen) == ["x", "x", "y", "y", "z", "z"]
