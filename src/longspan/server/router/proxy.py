"""The router: one OpenAI-compatible address for several prefill and decode instances.

It owns forwarding requests and answers, and retries when an instance does not answer; it must not interpret answers.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from yarl import URL

from longspan.disaggregation.signature import PREFILL_HEADER, SIGNATURE_HEADER, sign
from longspan.errors import EngineUnavailable, RequestError
from longspan.server.bodies import INLINE_BYTES, JsonBounds
from longspan.server.errors import Problem, problem_of
from longspan.server.generation import CLIENT_GONE, Json, Refusal, refusal, unless_gone
from longspan.server.listening import open_sockets
from longspan.server.middleware import BodyLimit, KeyCheck
from longspan.server.options import RouteOptions
from longspan.server.protocol import HttpConfig, announce
from longspan.server.request_log import RequestLog
from longspan.server.router.balance import Balance, Block, blocks_of
from longspan.server.router.instances import Instance, Instances
from longspan.server.tls import tls_context

_BOUNDS = JsonBounds(values=1 << 23)  # larger than any model needs: the instances check against max_model_len
_GENERATING = ("/v1/completions", "/v1/chat/completions")
_POSTED = (*_GENERATING, "/tokenize", "/detokenize")
_READ = ("/v1/models", "/version", "/openapi.json", "/docs")
_MODEL = "/v1/models/"
_HOP_BY_HOP = {
    "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length",
    PREFILL_HEADER, SIGNATURE_HEADER,
}  # fmt: skip
_PREFILL_WEIGHT, _DECODE_WEIGHT = 256.0, 65536.0  # fixed cost of a request, in bytes of prompt
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
        self._long_body = asyncio.Lock()  # held while a long body is parsed, which takes a multiple of its bytes

    async def forward(self, request: Request) -> Response:
        """Forward a request to a decode instance and return its answer."""
        body = await request.body()
        prompt, blocks = await self._prompt_of(body) if request.scope["path"] in _GENERATING else (0, [])
        decoders = {instance.url: instance for instance in self._instances.alive("decode")}
        prefillers = {instance.url: instance for instance in self._instances.alive("prefill")}
        order = self._prefill.ranked(prefillers, prompt, blocks)
        headers = {name: value for name, value in request.headers.items() if name not in _HOP_BY_HOP}
        for url in self._decode.ranked(decoders, prompt, blocks):
            named = [name for name in order if prompt and self._instances.accepts(decoders[url], prefillers[name])]
            added = self._decode.begin(url, prompt, blocks)
            ahead = (named[0], self._prefill.begin(named[0], prompt, blocks)) if named else None
            ended = self._ends(url, added, ahead)
            peers = self._peers([prefillers[name].address for name in named], body)
            try:
                return await self._answer(decoders[url], request, body, {**headers, **peers}, ended)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                ended(False)
                self._instances.lost(decoders[url], f"did not answer a request ({type(error).__name__})")
            except BaseException:
                ended(False)
                raise
        return refusal(EngineUnavailable("no decode instance is there; try again later, and see the router's log"))

    async def _prompt_of(self, body: bytes) -> tuple[int, list[Block]]:
        """See `_prompt`. Long bodies are parsed in a thread, so that other requests do not wait, one after another."""
        if len(body) <= INLINE_BYTES:
            return _prompt(body)
        async with self._long_body:
            return await asyncio.to_thread(_prompt, body)

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

    def _peers(self, addresses: list[str], body: bytes) -> dict[str, str]:
        """The headers that name prefill instances to a decode instance."""
        if not addresses:
            return {}
        token = self._instances.token
        signed = {SIGNATURE_HEADER: sign(token, addresses, body, time.time())} if token else {}
        return {PREFILL_HEADER: ",".join(addresses), **signed}

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
        asking = self._session.request(request.method, url, data=body or None, headers=headers, allow_redirects=False)
        answer = await unless_gone(asking, request.receive)
        if answer is None:
            ended(False)
            return Response(status_code=CLIENT_GONE)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        return StreamingResponse(_bytes(answer, instance, ended), answer.status, kept)


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


def _prompt(body: bytes) -> tuple[int, list[Block]]:
    """Bytes and blocks of the part of a body that decides which pages the request needs: its messages or prompt.

    Nothing for a body that is not valid; the decode instance answers with the error.
    """
    try:
        _BOUNDS.check([body])
        values = msgspec.json.decode(body)
    except (RequestError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0, []
    found = (values.get("messages") or values.get("prompt")) if isinstance(values, dict) else None
    if not found:
        return 0, []
    prompt = found.encode(errors="replace") if isinstance(found, str) else msgspec.json.encode(found)
    return len(prompt), blocks_of(prompt)
