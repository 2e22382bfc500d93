"""What every HTTP request passes through: the key, the size of its body.

It owns both checks, before any endpoint sees the request; it must not know the endpoints' bodies.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.errors import HttpError, problem_of
from longspan.server.generation import Json

_OPEN_PATHS = ("/", "/health", "/version", "/openapi.json", "/docs", "/metrics")


class KeyCheck:
    """401 for a missing or wrong key, compared in constant time. Probes and the page are open: they tell no text."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if it may."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                value = "..." if given else "''"
                error = HttpError(
                    401, "invalid_api_key", "Authorization", value, "is missing or wrong",
                    "send 'Authorization: Bearer KEY' with the key the server was started with",
                )  # fmt: skip
                await _refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body over the limit, whether it says so itself or only turns out to be."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max:
            await _refuse(self._error(declared.decode()), scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self._max else message

        async def unless_too_large(message: Message) -> None:
            if seen <= self._max:
                await send(message)

        await self._app(scope, counted, unless_too_large)
        if seen > self._max:  # whatever the application made of a body that broke off
            await _refuse(self._error(f"more than {self._max}"), scope, receive, send)

    def _error(self, size: str) -> HttpError:
        return HttpError(
            413, "body_too_large", "body", f"{size} bytes", f"exceeds the {self._max} bytes this server takes",
            "send less, or raise --max-body-bytes",
        )  # fmt: skip


async def _refuse(error: HttpError, scope: Scope, receive: Receive, send: Send) -> None:
    problem = problem_of(error)
    await Json(problem.body(), status_code=problem.status, headers=dict(problem.headers))(scope, receive, send)
