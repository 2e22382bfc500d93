"""Send the answer to a generating request, as one JSON body or as server-sent events.

It owns streaming, disconnects and keep-alives; it must not know the formats of completions and chats.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from longspan.disaggregation.signature import PREFILL_HEADER, SIGNATURE_HEADER, named_peers
from longspan.errors import RequestError
from longspan.request import RequestOutput, SamplingParams
from longspan.server.async_engine import AsyncEngine
from longspan.server.errors import HttpError, Problem, problem_of
from longspan.server.replies import Reply, usage

_KEEP_ALIVE = b": keep-alive\n\n"  # so that proxies do not time out during a long prefill
CLIENT_GONE = 499  # nginx's status for it; the client does not receive it
PROBLEM = "longspan.problem"  # where a request's scope has the `Problem` that it was answered with, if any
KEY_NAME = "longspan.key_name"  # where it has the name of the API key that it came with, if one is needed
_LOG = logging.getLogger("longspan.server")

T = TypeVar("T")
Updates = AsyncGenerator[list[RequestOutput], None]


async def respond(
    engine: AsyncEngine, reply: Reply, request: Request, stream: bool, salt_by_key: bool = False
) -> Response:
    """Complete the jobs of a reply. Raises for requests that cannot be served, before anything is sent."""
    peers = await _named_peers(engine, request)
    jobs = [replace(job, prefill_at=peers) for job in reply.jobs] if peers else reply.jobs
    if salt_by_key:
        jobs = [replace(job, params=_salted(job.params, request.scope[KEY_NAME])) for job in jobs]
    updates = engine.generate(jobs)
    outputs = await anext(updates)
    if stream:
        return EventStream(_events(reply, outputs, updates, request.scope), updates)
    return await _whole(reply, outputs, updates, request)


def _salted(params: SamplingParams, key_name: str) -> SamplingParams:
    """With the key's name before a salt of the client, who thus cannot give that of another. Names have no colon."""
    return replace(params, cache_salt=f"{key_name}:{params.cache_salt}")


async def _named_peers(engine: AsyncEngine, request: Request) -> tuple[str, ...]:
    """The prefill instances that a request names, on a decode instance. Raises `HttpError` if it may not name them."""
    config, named = engine.setup.config.transfer, request.headers.get(PREFILL_HEADER)
    if named is None or config is None or config.role != "decode":
        return ()
    signature, body = request.headers.get(SIGNATURE_HEADER, ""), await request.body()
    try:
        return named_peers(config, named, signature, body, time.time())
    except RequestError as error:
        raise HttpError(403, "prefill_refused", error.field, error.value, error.problem, error.remedy) from error


class Json(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode `content` as JSON."""
        return msgspec.json.encode(content)


class Refusal(Json):
    """An answer with an error, which is left in the request's scope for the log."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.body(), status_code=problem.status, headers=dict(problem.headers))
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        scope[PROBLEM] = self._problem
        await super().__call__(scope, receive, send)


def refusal(error: Exception) -> Refusal:
    """The answer to a request that failed with `error`."""
    return Refusal(problem_of(error))


class EventStream(Response):
    """Server-sent events. The request is aborted within a step after its client has disconnected."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], updates: Updates) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._updates = updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end, or until the client disconnects."""
        try:
            with suppress(OSError):
                await unless_gone(self._send(send), receive)
        finally:
            await self._updates.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _whole(reply: Reply, outputs: Sequence[RequestOutput], updates: Updates, request: Request) -> Response:
    try:
        if await unless_gone(_exhausted(updates), request.receive):
            return Json(reply.whole(outputs))
        return Response(status_code=CLIENT_GONE)
    finally:
        await updates.aclose()


async def _exhausted(updates: Updates) -> bool:
    async for _ in updates:
        pass
    return True


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """Await `work`, and cancel it if the client disconnects first. Returns its result, or None if it was cancelled."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(
    reply: Reply, outputs: Sequence[RequestOutput], updates: Updates, scope: Scope
) -> AsyncIterator[bytes]:
    """The events of a stream: chunks, usage if requested, `[DONE]`.

    An error is sent as an event, because the status has been sent already.
    """
    options = reply.stream_options

    def event(chunk: dict[str, Any]) -> bytes:
        return _event({**chunk, "usage": usage(outputs)} if options.continuous_usage_stats else chunk)

    try:
        for chunk in reply.open(outputs):
            yield event(chunk)
        async for changed in updates:
            yield b"".join(map(event, reply.chunks(changed))) if changed else _KEEP_ALIVE
        if options.include_usage:
            yield _event({**reply.envelope(), "choices": [], "usage": usage(outputs)})
    except Exception as error:
        scope[PROBLEM] = problem = problem_of(error)
        if problem.status == 500:
            _LOG.exception("a stream failed")
        yield _event(problem.body())
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
