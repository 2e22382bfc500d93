"""Limits on an HTTP connection: headers, seconds for headers and body, answers that are not read.

It owns what happens before a request reaches the application; the middleware limits the size of bodies, and
`connections.py` what all connections may hold together.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, TypeVar

import httptools
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from longspan.server.connections import BACKLOG, ConnectionLimiter, connections_allowed
from longspan.server.errors import Problem
from longspan.server.options import HttpLimits

_MAX_PIPELINED = 16  # requests behind one that is being answered; a client that waits for answers has none
_MAX_HEADERS = 512  # lines; each takes some 200 bytes beside its own
_LOG = logging.getLogger("longspan.server")
AnyServer = TypeVar("AnyServer", bound=uvicorn.Server)


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration for the server and the router."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        limits: HttpLimits,
        tls: ssl.SSLContext | None = None,
        files_each: int = 1,
    ) -> None:
        super().__init__(
            app, host=host, port=port, log_level="warning", access_log=False, http=BoundedProtocol, ws="none",
            timeout_keep_alive=limits.keep_alive_seconds, backlog=BACKLOG,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )  # fmt: skip
        self.limits = limits
        self.door = ConnectionLimiter(connections_allowed(limits, files_each))


async def announce(server: AnyServer, on_ready: Callable[[AnyServer], None]) -> None:
    """Call `on_ready` once the port is open."""
    while not server.started:
        await asyncio.sleep(0.01)
    on_ready(server)


class _Phase(Enum):
    """The part of a request that a connection receives."""

    IDLE = auto()  # none: it waits for the next request
    HEAD = auto()  # request line and headers
    BODY = auto()  # the body


class _AnswerIsRead:
    """A connection's transport for one request: closing it leaves a client that is still sending time to read."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)

    def close(self) -> None:
        """See `asyncio.Transport`."""
        self._protocol.end_answer()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on headers and on time, of which it has none itself."""

    def __init__(
        self,
        config: HttpConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._door = config.door
        self._refused = False
        self._ended = False  # the last answer has been written, and what the client still sends is not looked at
        self._progress = False  # whether the parser has completed a head, or found a part of a body, in this data
        self._quiet = 0  # bytes of headers or trailers since the parser last made progress
        self._answered: RequestResponseCycle | None = None  # the request being answered; `cycle` is the latest received
        self._unread: tuple[float, int] | None = None  # since when how many bytes of an answer wait for the client
        self._enter(_Phase.HEAD)

    @property
    def waits_for_client(self) -> bool:
        """Whether the server can do nothing for this connection until its client sends or reads more."""
        if self.flow.write_paused:
            return True
        return not self.pipeline if self._phase is _Phase.BODY else not self._is_answering

    @property
    def has_more_requests(self) -> bool:
        """Whether requests wait behind the one that is being answered. A client that waits for its answers has none."""
        return bool(self.pipeline)

    @property
    def waited(self) -> tuple[bool, float]:
        """A sort key: connections between two requests come first, then those that have waited longest.

        A new connection comes last: else it would be closed before its request comes, if all others are within bodies.
        """
        since = self._since if self._unread is None else self._unread[0]
        return self._phase is not _Phase.IDLE or self.flow.write_paused, since

    @property
    def unread_bytes(self) -> int:
        """Bytes of an answer that wait for the client, where they are so many that the answer is halted."""
        return self.transport.get_write_buffer_size() if self.flow.write_paused else 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)  # type: ignore[arg-type]
        limits = self._limits
        self._interval = min(limits.header_seconds, limits.stall_seconds) / 4
        self._timer = self.loop.call_later(self._interval, self._watch)
        self._door.admit(self, self.connections)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._timer.cancel()
        if self._answered is not None:
            self._answered.disconnected = True  # uvicorn says so to the latest only
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._unread = self.loop.time(), self.transport.get_write_buffer_size()
        self._door.halt(self.connections)  # type: ignore[arg-type]

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._unread = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._refused or self._ended:
            return
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
        room = self._limits.max_header_bytes - self._quiet
        # in two parts, so that `_feed` notices headers over the limit before the parser has more of them
        if self._phase is _Phase.HEAD and len(data) > room:
            self._feed(data[:room])
            data = data[room:]
        if not (self._refused or self.transport.is_closing()):
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._progress = False
        super().data_received(data)
        self._quiet = 0 if self._progress else self._quiet + len(data)
        most = self._limits.max_header_bytes
        if self._quiet >= most and not self._refused:
            message = f"headers: exceed the {most} bytes this server takes; send fewer or shorter ones"
            self._refuse(Problem(431, message, code="headers_too_large"))

    def on_message_begin(self) -> None:
        """See uvicorn."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse(Problem(400, f"request: {_MAX_PIPELINED} others are not answered yet; wait for answers"))
            raise httptools.HttpParserError  # of what has been received, nothing more is looked at
        super().on_message_begin()
        if self._phase is not _Phase.HEAD:  # pipelined behind another request
            self._enter(_Phase.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See uvicorn."""
        super().on_header(name, value)
        if len(self.headers) > _MAX_HEADERS:
            message = f"headers: are more than the {_MAX_HEADERS} lines this server takes; send fewer"
            self._refuse(Problem(431, message, code="headers_too_large"))
            raise httptools.HttpParserError

    def on_headers_complete(self) -> None:
        """See uvicorn."""
        self._enter(_Phase.BODY)
        super().on_headers_complete()
        if self.pipeline and self.pipeline[0][0] is self.cycle:  # it waits behind another request
            self.pipeline[0] = self.cycle, self._door.in_turn(self.pipeline[0][1])

    def on_body(self, body: bytes) -> None:
        """See uvicorn."""
        self._progress = True
        self._window_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See uvicorn."""
        self._enter(_Phase.IDLE)
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        if not cycle.keep_alive:
            cycle.transport = _AnswerIsRead(self)  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def end_answer(self) -> None:
        """Close the connection after its last answer.

        If the client is within its body, the kernel would reset the connection, and the client lose the answer. It gets
        the end of the answer instead, and `on_response_complete` closes later.
        """
        if self._phase is not _Phase.BODY or not self.transport.can_write_eof():
            self.transport.close()
        elif not self.transport.is_closing():
            self._ended = True
            self.transport.write_eof()

    def on_response_complete(self) -> None:
        """See uvicorn. A client that is answered before the end of its body may go on sending for a limited time."""
        was_last = not self.pipeline
        super().on_response_complete()
        if self._refused and was_last:
            self.transport.close()
        if self._phase is _Phase.BODY:
            self.loop.call_later(self._limits.linger_seconds, self._end_unread, self._since)

    def _end_unread(self, since: float) -> None:
        if self._phase is _Phase.BODY and self._since == since:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn."""
        if self._refused:
            return
        self._refuse(Problem(400, f"request: is no valid HTTP ({msg.rstrip('.')}); change it", code="invalid_http"))

    @property
    def _client(self) -> str:
        host, port = self.client or ("-", 0)
        return f"{host}:{port}"

    @property
    def _is_answering(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = self._window = self.loop.time()
        self._window_bytes = 0
        self._progress = True

    def _watch(self) -> None:
        """Refuse a request that arrives too slowly; end an answer that is read too slowly. Called at an interval."""
        if not self._client_reads():
            self.transport.abort()
            return
        if not (self._refused or self._ended or self.transport.is_closing()):
            self._check_pace()
        self._timer = self.loop.call_later(self._interval, self._watch)

    def _client_reads(self) -> bool:
        """Whether the client takes what has been written for it, over a window of `stall_seconds`."""
        now, limits, waiting = self.loop.time(), self._limits, self.transport.get_write_buffer_size()
        if not waiting or not (self.flow.write_paused or self.transport.is_closing()):
            self._unread = None
        elif self._unread is None:
            self._unread = now, waiting
        elif now - self._unread[0] >= limits.stall_seconds:
            taken, self._unread = self._unread[1] - waiting, (now, waiting)
            return taken >= limits.min_body_rate * limits.stall_seconds
        return True

    def _check_pace(self) -> None:
        now, limits = self.loop.time(), self._limits
        if self._phase is _Phase.HEAD and not self._is_answering and now - self._since >= limits.header_seconds:
            self._refuse_late(f"headers: are not complete after {limits.header_seconds:g} seconds")
        elif self._phase is _Phase.BODY and now - self._since >= limits.body_seconds:
            self._refuse_late(f"body: is not complete after {limits.body_seconds:g} seconds")
        elif self._phase is _Phase.BODY and now - self._window >= limits.stall_seconds:
            few = self._window_bytes < limits.min_body_rate * limits.stall_seconds
            if few and not self.flow.read_paused:  # while reading is paused, it is the server that is slow
                self._refuse_late(f"body: comes with less than {limits.min_body_rate} bytes a second")
            self._window, self._window_bytes = now, 0

    def _refuse_late(self, problem: str) -> None:
        if self._phase is _Phase.HEAD and not self._quiet:
            self.transport.close()  # no byte of a request has come, so there is nothing to answer
        else:
            self._refuse(Problem(408, f"{problem}; send it faster", "timeout_error", code="request_timeout"))

    def _refuse(self, problem: Problem) -> None:
        """Answer with an error, unless the application has begun to answer, and close the connection.

        Complete requests that came before on the connection are answered first, and then without this error: its client
        may have counted the bytes of a body wrongly, say.
        """
        self._refused = True
        _LOG.info("%s: refused with %d: %s", self._client, problem.status, problem.message)
        self._unset_keepalive_if_required()
        cycle = self.cycle if self._phase is _Phase.BODY else None
        if cycle is not None:
            cycle.disconnected = True  # uvicorn drops whatever the application still sends
            cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()  # it waits behind the others
                return
            if cycle.response_started:
                self.transport.close()
                return
        elif self._is_answering:
            return
        body = msgspec.json.encode(problem.body())
        phrase = HTTPStatus(problem.status).phrase
        head = (
            f"HTTP/1.1 {problem.status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        if self.transport.can_write_eof():  # closing now would reset the connection and lose the answer
            self.transport.write_eof()
        self.loop.call_later(self._limits.linger_seconds, self.transport.close)
