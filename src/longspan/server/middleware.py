"""Middleware for every HTTP request: the check of the API key, and the limit on the size of bodies.

It owns both checks, before any endpoint sees the request; it must not know the formats of bodies.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.errors import LongspanError, QueueFull
from longspan.server.errors import HttpError
from longspan.server.generation import KEY_NAME, refusal
from longspan.server.keys import NamedKey, name_of

_OPEN_PATHS = ("/", "/health", "/version", "/openapi.json", "/docs", "/metrics")
_SMALL_BODY = 64 << 10  # uvicorn may buffer as much for each connection anyway
_LARGEST_BODIES = 4  # bodies of the largest size that may be held together
_LEAST_HELD = 64 << 20  # bytes of bodies that may be held together at least
BODY_HOLDS = "longspan.body_holds"  # where a scope has the function that is told how many bytes a body takes now


class KeyCheck:
    """Answers 401 to a missing or wrong key.

    Probes and the live page need no key, because they show no text of requests.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[NamedKey]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its key is right or its path needs none."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            given = dict(scope["headers"]).get(b"authorization", b"")
            scope[KEY_NAME] = name_of(given, self._keys)
            if scope[KEY_NAME] is None:
                value = "..." if given else "''"
                error = HttpError(
                    401, "invalid_api_key", "Authorization", value, "is missing or wrong",
                    "send 'Authorization: Bearer KEY' with a key that the server was started with",
                )  # fmt: skip
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Answers 413 to a body over the limit, by its content-length or by the bytes received.

    Answers 429 while the bodies of all requests exceed `max_held_bytes` together. A body counts with its bytes until
    its request is answered, unless the application tells the function at `BODY_HOLDS` another number: 0 once it holds
    it no more, or what it takes once it is decoded. Small bodies are always accepted: the limit on connections bounds
    them.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_held_bytes: int | None = None) -> None:
        self._app = app
        self._max = max_bytes
        self._max_held = max_held_bytes or max(_LARGEST_BODIES * max_bytes, _LEAST_HELD)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and len(declared) < 20 and int(declared) > self._max:
            await refusal(self._too_large(declared.decode()))(scope, receive, send)
            return
        seen = held = 0
        refused: LongspanError | None = None

        def holds(size: int) -> None:
            nonlocal held
            if seen <= _SMALL_BODY:
                return
            if size > held and self._held + size - held > self._max_held:
                raise self._too_many()
            self._held += size - held
            held = size

        async def counted() -> Message:
            nonlocal seen, held, refused
            message = await receive()
            if not message.get("body") and refused is None:
                return message
            seen += len(message.get("body", b""))
            if seen > self._max:
                refused = self._too_large(f"more than {self._max}")
            elif refused is None:
                try:
                    holds(seen)
                except QueueFull as error:
                    refused = error
            return {"type": "http.disconnect"} if refused else message

        async def unless_refused(message: Message) -> None:
            if refused is None:
                await send(message)

        scope[BODY_HOLDS] = holds
        try:
            await self._app(scope, counted, unless_refused)
        except ClientDisconnect:
            if refused is None:
                raise
        finally:
            holds(0)
        if refused is not None:  # the application saw a disconnect, and its answer was dropped
            await refusal(refused)(scope, receive, send)

    def _too_large(self, size: str) -> HttpError:
        return HttpError(
            413, "body_too_large", "body", f"{size} bytes", f"exceeds the {self._max} bytes this server takes",
            "send less, or raise --max-body-bytes",
        )  # fmt: skip

    def _too_many(self) -> QueueFull:
        return QueueFull(
            "bodies", f"{self._held} bytes", f"of requests are held, of at most {self._max_held}",
            "try again in a moment, or raise --max-body-bytes, of which that is a multiple",
        )  # fmt: skip
