"""What clients may hold: large bodies, unread answers, places, and the turns of requests sent behind others."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from longspan.errors import LongspanError
from longspan.server.app import _route_class
from longspan.server.bodies import BodyReader, JsonBounds
from longspan.server.connections import ConnectionLimiter
from longspan.server.generation import refusal
from longspan.server.middleware import BODY_HOLDS, BodyLimit
from longspan.server.options import HttpLimits, RouteOptions
from longspan.server.protocol import HttpConfig
from longspan.server.router.proxy import http_config
from longspan.server.tokens import TokenizeBody
from tests.server.small import SEND_BUFFER
from tests.server.test_bystander import Target, send

GET = b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def serving(
    application: ASGIApp, limits: HttpLimits | None = None, door: ConnectionLimiter | None = None
) -> AsyncIterator[tuple[uvicorn.Server, Target]]:
    """An application behind the server's protocol, in this event loop."""
    config = HttpConfig(application, "127.0.0.1", 0, limits or HttpLimits())
    config.door = door or config.door
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.bind(("127.0.0.1", 0))
    running = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield server, Target(listener.getsockname()[1], (), 0)
    server.should_exit = server.force_exit = True
    await running


async def newcomer(target: Target) -> bytes:
    return await asyncio.to_thread(send, target, GET % b"/", b"", 0)


def test_large_bodies_have_a_bound_together_and_small_ones_always_get_in():
    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        if scope["path"] == "/dropped":
            scope[BODY_HOLDS](0)
        await asyncio.sleep(0 if len(body) < 1000 else 0.05)
        await Response(str(len(body)))(scope, receive, send)

    async def statuses(path: str, *sizes: int) -> list[int]:
        limited = BodyLimit(application, max_bytes=1 << 20, max_held_bytes=300_000)

        async def ask(size: int) -> int:
            found: list[int] = []
            parts = [b"a" * size]

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(0)
                return {"type": "http.request", "body": parts.pop() if parts else b"", "more_body": bool(parts)}

            async def send(message: Any) -> None:
                found.append(message.get("status", 0))

            await limited({"type": "http", "path": path, "method": "POST", "headers": []}, receive, send)
            return found[0]

        together = await asyncio.gather(*map(ask, sizes))
        return [*together, await ask(250_000)]  # afterwards there is room again

    assert asyncio.run(statuses("/", 200_000, 200_000, 50_000)) == [200, 429, 200, 200]
    assert asyncio.run(statuses("/dropped", 200_000, 200_000, 50_000)) == [200] * 4


def test_a_text_with_wide_characters_counts_with_the_bytes_that_python_takes_for_it():
    app = FastAPI()
    app.router.route_class = _route_class(BodyReader(JsonBounds()))

    @app.post("/")
    async def _(body: TokenizeBody) -> None:
        """Accept it."""

    @app.exception_handler(LongspanError)
    async def _(request: Request, error: Exception) -> Response:
        return refusal(error)

    async def status(prompt: str) -> int:
        limited = ASGITransport(BodyLimit(app, max_bytes=1 << 20, max_held_bytes=300_000))
        async with AsyncClient(transport=limited, base_url="http://x") as client:
            return (await client.post("/", json={"prompt": prompt})).status_code

    assert [asyncio.run(status("a" * 200_000 + end)) for end in ("", "é", "\U0001f600")] == [200, 429, 429]
    assert asyncio.run(status("\U0001f600" * 15_000)) == 200  # small


def test_what_clients_do_not_read_is_bounded_together():
    size, most = 1 << 20, 4 << 20

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await Response(bytes(size))(scope, receive, send)

    async def unread_bytes() -> int:
        async with serving(application, door=ConnectionLimiter(100, most)) as (server, target):
            readers = [target.connect(GET % b"/", 4096) for _ in range(20)]
            while server.server_state.total_requests < len(readers):
                await asyncio.sleep(0.01)
            found = sum(each.unread_bytes for each in server.server_state.connections)
            for each in readers:
                each.close()
            return found

    assert size // 2 < asyncio.run(unread_bytes()) <= most


def test_a_newcomer_is_served_although_clients_with_many_requests_each_hold_all_connections():
    async def newcomers_answer() -> bytes:
        over = asyncio.Event()

        async def application(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                await over.wait()
            await Response(b"here")(scope, receive, send)

        async with serving(application, HttpLimits(max_connections=5)) as (server, target):
            others = [target.connect(GET % b"/slow" * 3) for _ in range(5)]
            while sum(bool(each.pipeline) for each in server.server_state.connections) < 5:
                await asyncio.sleep(0.01)
            got = await newcomer(target)
            over.set()
            for each in others:
                each.close()
            return got

    assert b" 200 " in asyncio.run(newcomers_answer())


def test_requests_behind_others_share_few_places_and_a_newcomer_needs_none():
    async def answered_together() -> int:
        over, begun = asyncio.Event(), 0

        async def application(scope: Any, receive: Any, send: Any) -> None:
            nonlocal begun
            if scope["path"] == "/behind":
                begun += 1
                await over.wait()
            await Response(b"here")(scope, receive, send)

        async with serving(application) as (server, target):
            others = [target.connect(GET % b"/" + GET % b"/behind" * 3) for _ in range(10)]
            while server.server_state.total_requests < len(others):
                await asyncio.sleep(0.01)
            for _ in range(5):
                assert b" 200 " in await newcomer(target)
            found = begun
            over.set()
            for each in others:  # everybody gets all answers
                received = b""
                while received.count(b"here") < 4:
                    received += await asyncio.to_thread(each.recv, 1 << 16)
                each.close()
            return found

    assert asyncio.run(answered_together()) == 4


def test_a_client_that_wants_no_more_answers_gets_the_one_to_a_body_that_is_refused_while_it_comes():
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await Response(b"too large", 413)(scope, receive, send)

    def ask(target: Target) -> bytes:
        head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (16 << 20)
        with target.connect(head) as client:
            for _ in range(16):  # a closed connection would be noticed within these
                client.sendall(bytes(1 << 20))
            received = b""
            while part := client.recv(1 << 16):
                received += part
            return received

    async def answer() -> bytes:
        async with serving(application) as (_, target):
            return await asyncio.to_thread(ask, target)

    assert asyncio.run(answer()).startswith(b"HTTP/1.1 413 ")


def test_a_routers_open_files_suffice_for_its_clients_and_as_many_connections_to_instances():
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
        assert 2 * http_config(Response(), RouteOptions(), None).door.most < 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
