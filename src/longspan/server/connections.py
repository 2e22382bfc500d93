"""Limits on what all HTTP connections hold together: their number, requests sent ahead, answers that are not read.

It owns which connection is closed; `protocol.py` has the limits on each.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from longspan.server.options import HttpLimits

if TYPE_CHECKING:
    from longspan.server.protocol import BoundedProtocol

BACKLOG = 256  # connections that one turn of the event loop may accept before the first of them is counted
_RESERVE = 128  # open files that are not connections: sockets of the core, logs, libraries, templates
_MOST_CONNECTIONS = 8192  # half a gigabyte if each has 64 KiB of headers
_LOG_SECONDS = 10.0
_PLACES_BEHIND = 4  # requests behind one that is being answered that have their turn together, of all connections
_MAX_UNREAD = 256 << 20  # bytes of answers that may wait for their clients, all connections together
_LOG = logging.getLogger("longspan.server")


def connections_allowed(limits: HttpLimits, files_each: int = 1) -> int:
    """The most connections that may be open at the same time, if each takes so many open files."""
    if limits.max_connections is not None:
        return limits.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(max((files - BACKLOG - _RESERVE) // files_each, files // 4, 1), _MOST_CONNECTIONS)


class ConnectionLimiter:
    """Limits the number of open connections, and the bytes of answers that their clients do not read.

    Beyond a limit, the one that has waited longest is closed. Requests that are sent before the one in front of them is
    answered share a few places, so that connections with many of them do not take the turns of all others.
    """

    def __init__(self, most: int, most_unread: int = _MAX_UNREAD) -> None:
        self.most = most
        self._most_unread = most_unread
        self._behind = asyncio.Semaphore(_PLACES_BEHIND)
        self._turned_away = 0
        self._logged = float("-inf")

    def in_turn(self, app: Any) -> Any:
        """The application for a request behind another one: it waits for a place."""

        async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
            async with self._behind:
                await app(scope, receive, send)

        return waiting

    def admit(self, newest: BoundedProtocol, connections: set[BoundedProtocol]) -> None:
        """Admit the newest connection.

        At the limit, close one without a complete request, or else one with several, or else the newest.
        """
        if len(connections) <= self.most:
            return
        others = connections - {newest}
        waiting = [each for each in others if each.waits_for_client]
        waiting = waiting or [each for each in others if each.has_more_requests]
        chosen = min(waiting, key=lambda each: each.waited, default=newest)
        chosen.transport.abort()
        connections.discard(chosen)
        self._turned_away += 1
        now = newest.loop.time()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            _LOG.warning(
                "%d connections are open, the most this process holds: those that wait longest for their client are"
                " closed (%d so far); raise `ulimit -n` if they are wanted", self.most, self._turned_away,
            )  # fmt: skip

    def halt(self, connections: set[BoundedProtocol]) -> None:
        """Close connections whose clients do not read, until what waits for all of them is within the limit."""
        unread = sum(each.unread_bytes for each in connections)
        for each in sorted((each for each in connections if each.unread_bytes), key=lambda each: each.waited)[:-1]:
            if unread <= self._most_unread:
                return
            unread -= each.unread_bytes
            each.transport.abort()
