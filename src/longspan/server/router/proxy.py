"""The router: one OpenAI-compatible address for several prefill and decode instances.

It owns forwarding requests and answers, and retries when an instance does not answer; it must not interpret answers.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from yarl import URL

from longspan.disaggregation.signature import PREFILL_HEADER, SIGNATURE_HEADER, sign
from longspan.errors import EngineUnavailable
from longspan.server.bodies import INLINE_BYTES, received
from longspan.server.errors import Problem, problem_of
from longspan.server.generation import CLIENT_GONE, Json, Refusal, refusal, unless_gone
from longspan.server.listening import open_sockets
from longspan.server.middleware import BODY_HOLDS, BodyLimit, KeyCheck
from longspan.server.options import RouteOptions
from longspan.server.protocol import HttpConfig, announce
from longspan.server.request_log import RequestLog
from longspan.server.router.balance import Balance, Block, blocks_of
from longspan.server.router.instances import Instance, Instances
from longspan.server.tls import tls_context

_GENERATING = ("/v1/completions", "/v1/chat/completions")
_POSTED = (*_GENERATING, "/tokenize", "/detokenize")
_READ = ("/v1/models", "/version", "/openapi.json", "/docs")
_MODEL = "/v1/models/"
_HOP_BY_HOP = {
    "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length",
    PREFILL_HEADER, SIGNATURE_HEADER,
}  # fmt: skip
_PREFILL_WEIGHT, _DECODE_WEIGHT = 256.0, 65536.0  # fixed cost of a request, in bytes of prompt
_PIECE_BYTES = 256 << 10  # of a body that is forwarded
_FILES_EACH = 2  # open files for a client: its connection, and one to an instance
_LOG = logging.getLogger("longspan.disaggregation")


class Router:
    """Forwards requests to decode instances, trying the next one if one does not answer.

    `PREFILL_HEADER` of a forwarded request tells the decode instance which prefill instances are alive, best first.
    """

    def __init__(self, instances: Instances, session: aiohttp.ClientSession) -> None:
        self._instances = instances
        self._session = session
        self._prefill = Balance(_PREFILL_WEIGHT)
        self._decode = Balance(_DECODE_WEIGHT)

    async def forward(self, request: Request) -> Response:
        """Forward a request to a decode instance and return its answer."""
        try:
            body = await received(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        prompt, blocks = prompt_of(body) if request.scope["path"] in _GENERATING else (0, [])
        decoders = {instance.url: instance for instance in self._instances.alive("decode")}
        prefillers = {instance.url: instance for instance in self._instances.alive("prefill")}
        order = self._prefill.ranked(prefillers, prompt, blocks)
        headers = {name: value for name, value in request.headers.items() if name not in _HOP_BY_HOP}
        for url in self._decode.ranked(decoders, prompt, blocks):
            named = [name for name in order if prompt and self._instances.accepts(decoders[url], prefillers[name])]
            added = self._decode.begin(url, prompt, blocks)
            ahead = (named[0], self._prefill.begin(named[0], prompt, blocks)) if named else None
            ended = self._ends(url, added, ahead)
            try:
                peers = await self._peers([prefillers[name].address for name in named], body)
                return await self._answer(decoders[url], request, body, {**headers, **peers}, ended)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                ended(False)
                self._instances.lost(decoders[url], f"did not answer a request ({type(error).__name__})")
            except BaseException:
                ended(False)
                raise
        return refusal(EngineUnavailable("no decode instance is there; try again later, and see the router's log"))

    def state(self) -> dict[str, Any]:
        """Role and state of every instance, as JSON."""
        return {
            instance.url: {
                "role": instance.role, "alive": instance.answer is not None,
                **({"waiting": instance.answer.waiting, "running": instance.answer.running} if instance.answer else {}),
            }
            for instance in self._instances.all
        }  # fmt: skip

    @property
    def is_ready(self) -> bool:
        """Whether a decode instance is alive."""
        return bool(self._instances.alive("decode"))

    async def _peers(self, addresses: list[str], body: bytes) -> dict[str, str]:
        """The headers that name prefill instances to a decode instance. A long body is signed in a thread."""
        if not addresses:
            return {}
        named, token = {PREFILL_HEADER: ",".join(addresses)}, self._instances.token
        if not token:
            return named
        signing = partial(sign, token, addresses, body, time.time())
        signature = signing() if len(body) <= INLINE_BYTES else await asyncio.to_thread(signing)
        return {**named, SIGNATURE_HEADER: signature}

    def _ends(self, url: str, added: float, ahead: tuple[str, float] | None) -> Callable[[bool], None]:
        """A function that takes a request off the loads of its instances.

        It must be called with True when the answer begins, as the prompt has been computed then, and with False when
        the answer ends. Further calls do nothing.
        """
        open_parts = {"decode": True, "prefill": ahead is not None}

        def ended(only_prefill: bool) -> None:
            if open_parts["prefill"] and ahead is not None:
                open_parts["prefill"] = False
                self._prefill.end(*ahead)
            if open_parts["decode"] and not only_prefill:
                open_parts["decode"] = False
                self._decode.end(url, added)

        return ended

    async def _answer(
        self, instance: Instance, request: Request, body: bytes, headers: Mapping[str, str],
        ended: Callable[[bool], None],
    ) -> Response:  # fmt: skip
        """The instance's answer, streamed. Raises the connection's error if it does not begin to answer."""
        url = URL(f"{instance.url}{_target(request)}", encoded=True)
        sent = {**headers, "Content-Length": str(len(body))} if body else headers
        data = _pieces(body) if body else None
        asking = self._session.request(request.method, url, data=data, headers=sent, allow_redirects=False)
        answer = await unless_gone(asking, request.receive)
        if answer is None:
            ended(False)
            return Response(status_code=CLIENT_GONE)
        request.scope[BODY_HOLDS](0)  # an answer may take long, and the body has been sent
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        return StreamingResponse(_bytes(answer, instance, ended), answer.status, kept)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body, as fast as the instance takes it. Given whole it would be copied, and lie in the connection's buffer."""
    for begin in range(0, len(body), _PIECE_BYTES):
        yield body[begin : begin + _PIECE_BYTES]


async def _bytes(
    answer: aiohttp.ClientResponse, instance: Instance, ended: Callable[[bool], None]
) -> AsyncIterator[bytes]:
    """The body of an answer. If a stream of events breaks off, an error event is added."""
    try:
        async for part in answer.content.iter_any():
            ended(True)
            yield part
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        _LOG.warning("decode instance %s broke off an answer: %s", instance.url, error)
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise
        problem = problem_of(EngineUnavailable("the decode instance ended within the answer; send the request again"))
        yield b"data: " + msgspec.json.encode(problem.body()) + b"\n\ndata: [DONE]\n\n"
    finally:
        answer.close()
        ended(False)


def build_router(router: Router, options: RouteOptions) -> Starlette:
    """The application of a router. Its caller polls the instances."""

    async def health(_: Request) -> Response:
        return Json({"status": "ready" if router.is_ready else "not ready"}, 200 if router.is_ready else 503)

    async def state(_: Request) -> Response:
        return Json(router.state())

    async def forward(request: Request) -> Response:
        return await router.forward(request)

    async def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = (
            f"{request.method} {request.scope['path']} is nothing that the router forwards; it takes POST of "
            f"{', '.join(_POSTED)} and GET of {', '.join(_READ)}; ask the instance itself for the rest"
        )
        return Refusal(Problem(status, message, code=HTTPStatus(status).name.lower()))

    app = Starlette(
        routes=[
            Route("/health", health), Route("/internal/instances", state),
            *(Route(path, forward, methods=["POST"]) for path in _POSTED),
            *(Route(path, forward, methods=["GET"]) for path in (*_READ, f"{_MODEL}{{name:path}}")),
        ],
        exception_handlers={404: failed, 405: failed},
    )  # fmt: skip
    app.router.redirect_slashes = False  # a redirection would lead where the client's Host header says
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    if options.keys:
        app.add_middleware(KeyCheck, keys=options.keys)
    app.add_middleware(RequestLog, options=options.log)
    return app


def http_config(app: ASGIApp, options: RouteOptions, tls: ssl.SSLContext | None) -> HttpConfig:
    """uvicorn's configuration for a router."""
    return HttpConfig(app, options.host, options.port, options.http, tls, _FILES_EACH)


async def route(instances: Instances, options: RouteOptions, on_ready: Callable[[uvicorn.Server], None]) -> None:
    """Serve until a signal. `on_ready` is called once all instances have answered and the port is open.

    Raises `ConfigError` for instances that do not answer or do not fit together.
    """
    tls, sockets = tls_context(options.tls), open_sockets(options)
    key = {"Authorization": f"Bearer {options.keys[0].key}"} if options.keys else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0), headers=key,
        cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
    ) as session:  # fmt: skip
        await instances.wait(session, options.wait_seconds)
        app = build_router(Router(instances, session), options)
        server = uvicorn.Server(http_config(app, options, tls))
        watching = asyncio.create_task(instances.watch(session))
        announcing = asyncio.create_task(announce(server, on_ready))
        try:
            await server.serve(sockets)
        finally:
            for task in (watching, announcing):
                task.cancel()


def _target(request: Request) -> str:
    """Path and query for the instance. Taken from the scope, because `request.url` depends on the Host header."""
    name = request.path_params.get("name")
    path = request.scope["path"] if name is None else f"{_MODEL}{quote(name, safe='')}"
    query = request.scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


class _Prompt(msgspec.Struct, frozen=True):
    """What decides which pages a request needs. `Raw` refers to the bytes of the body, so nothing is copied."""

    # of a chat
    messages: msgspec.Raw = msgspec.Raw()
    # of a completion
    prompt: msgspec.Raw = msgspec.Raw()


_READ_PROMPT = msgspec.json.Decoder(_Prompt)
_NO_PROMPT = (b"", b"null", b'""', b"[]")


def prompt_of(body: bytes) -> tuple[int, list[Block]]:
    """Bytes and blocks of a body's messages or prompt, as they were sent.

    All else is skipped, so this takes no memory, and at most 0.3 s for 64 MB. Nothing for a body that is not valid; the
    decode instance answers with the error.
    """
    try:
        found = _READ_PROMPT.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return 0, []
    for raw in (found.messages, found.prompt):
        sent = memoryview(raw)
        if sent not in _NO_PROMPT:
            return len(sent), blocks_of(sent)
    return 0, []
