"""A line in the log for each HTTP request, and a count of those that failed.

It owns what the log tells of a request: never a prompt, a key, or anything of a body but names of fields.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.errors import Problem, cut, problem_of
from longspan.server.generation import CLIENT_GONE, PROBLEM
from longspan.server.history import FailedRequest
from longspan.server.options import LogOptions

# asked for again and again by monitors, the live page and the router
_POLLED = ("/health", "/metrics", "/internal/state", "/internal/peer", "/internal/instances")
_SHOWN = 200  # characters of a path
_LOG = logging.getLogger("longspan.server")


class RequestLog:
    """Logs client, method, path, status and milliseconds of each request, and what was wrong with it.

    Lines of status 5xx are warnings, and those of paths that are polled are debug lines while all is well.
    """

    def __init__(
        self, app: ASGIApp, options: LogOptions, on_failed: Callable[[FailedRequest], None] | None = None
    ) -> None:
        self._app = app
        self._options = options
        self._on_failed = on_failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log it once it has been answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, complete = time.monotonic(), CLIENT_GONE, False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # answered with 500 by a layer outside this one
            scope[PROBLEM], status, complete = problem_of(error), 500, True
            raise
        finally:
            self._ended(scope, status, complete, time.monotonic() - began)

    def _ended(self, scope: Scope, status: int, complete: bool, seconds: float) -> None:
        problem: Problem | None = scope.get(PROBLEM)
        path = cut(quote(scope["path"]), _SHOWN)  # quoted, so that no line break gets into the log
        reason = "" if complete else "the client has left"
        if problem is not None:
            # a stream has been answered with 200 before it fails
            reason = problem.reason if problem.status == status else f"{problem.status}, {problem.reason}"
            status = max(status, problem.status)
        level = _level(scope["path"], status)
        if not self._options.disable_access or level >= logging.WARNING:
            host, port = scope.get("client") or ("-", 0)
            shown = f"{host}:{port} {scope['method']} {path} {status} {1000 * seconds:.0f} ms"
            _LOG.log(level, "%s", f"{shown}: {reason}" if reason else shown)
        if problem is not None and self._on_failed is not None:
            self._on_failed(FailedRequest(problem.status, scope["method"], path, problem.reason))


def _level(path: str, status: int) -> int:
    if status >= 500:
        return logging.WARNING
    return logging.DEBUG if path in _POLLED and status < 400 else logging.INFO
