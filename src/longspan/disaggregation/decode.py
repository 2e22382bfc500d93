"""The decode instance's role: has prompts computed elsewhere, and falls back to others, at last to itself.

It owns where each prompt is computed and what happens when that fails; placing and filling pages is the scheduler's and
the ranks' business.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import zmq

from longspan.config import TransferConfig
from longspan.disaggregation import messages
from longspan.disaggregation.connection import Connection, one_line
from longspan.disaggregation.driver import Desk, Role
from longspan.disaggregation.layout_map import problem_of
from longspan.disaggregation.messages import Format
from longspan.plan.plan import Fetch, StepPlan
from longspan.plan.source import Part
from longspan.request import CoreRequest

_MAX_CONNECTIONS = 64
_LOG = logging.getLogger("longspan.disaggregation")
CachedTokens = Callable[["CoreRequest"], int]


@dataclass(eq=False)
class _Remote:
    """A request whose prompt is computed elsewhere."""

    request: CoreRequest
    # addresses that can be asked next
    others: list[str]
    # where it is computed, and under which of our numbers
    connection: Connection | None = None
    sent: int = 0
    # what the prompt is called there, None until it is told
    accepted: str | None = None
    computed: bool = False
    # when it was asked for, or something moved last, in `time.monotonic()`
    heard: float = 0.0
    # what the ranks carry out, those that have all of theirs, and the bytes of these
    fetch: Fetch | None = None
    arrived: set[int] = field(default_factory=set)
    received: int = 0


class DecodeRole(Role):
    """See `Role`. `cached` says how many of a request's tokens need not be computed anywhere."""

    def __init__(
        self, config: TransferConfig, form: Format, parts: tuple[Part, ...], cached: CachedTokens, page_size: int
    ) -> None:
        super().__init__(config, form)
        self._parts = parts
        self._token = config.token
        self._own_peers = deque(config.prefill_peers)
        self._cached = cached
        self._page_size = page_size
        self._ranks = 0
        self._connections: dict[str, Connection] = {}
        self._remotes: dict[str, _Remote] = {}
        self._by_sent: dict[int, _Remote] = {}
        self._by_fetch: dict[int, _Remote] = {}
        self._numbers = count(1)

    def start(self, desk: Desk, ranks: int) -> None:
        """See `Role.start`."""
        self._desk, self._ranks = desk, ranks

    def add(self, request: CoreRequest) -> bool:
        """See `Role.add`: what is new to the cache by a page or less is computed here.

        A request that names no instances goes to the configured ones in turn.
        """
        known = len(request.prompt_token_ids) + len(request.output_token_ids) - 1
        scored = request.params.prompt_logprobs is not None  # every token is wanted, not only its KV
        salted = request.params.cache_salt != ""  # a prefill instance would share its pages with everybody
        peers = request.prefill_at or self._own_peers
        if not peers or scored or salted or known - self._cached(request) <= self._page_size:
            return False
        remote = self._remotes[request.request_id] = _Remote(request, list(peers))
        if peers is self._own_peers:
            self._own_peers.rotate(-1)
        self._ask(remote)
        return True

    def submitted(self, plan: StepPlan) -> None:
        """See `Role.submitted`: requests of which the scheduler has placed the pages are being fetched."""
        for fetch in plan.fetches:
            remote = self._remotes[fetch.request_id]
            remote.fetch, remote.heard = fetch, time.monotonic()
            self._by_fetch[fetch.number] = remote

    def finish(self, request_id: str) -> None:
        """See `Role.finish`."""
        remote = self._remotes.pop(request_id, None)
        if remote is not None:
            self._leave(remote)

    def exchange(self) -> None:
        """See `Role.exchange`."""
        for message in self._mailbox.from_ranks():
            match message:
                case messages.Moving(fetch) if fetch in self._by_fetch:
                    self._by_fetch[fetch].heard = time.monotonic()
                case messages.Arrived(rank, fetch, received) if fetch in self._by_fetch:
                    self._arrived(self._by_fetch[fetch], rank, received)
                case messages.FetchFailed(rank, fetch, reason) if fetch in self._by_fetch:
                    self._retry(self._by_fetch[fetch], f"rank {rank}: {one_line(reason)}")
        for connection in list(self._connections.values()):
            self._hear(connection)
        now = time.monotonic()
        for remote in list(self._remotes.values()):
            if problem := self._overdue(remote, now):
                self._retry(remote, problem)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """See `Role.sockets`."""
        return [*super().sockets, *(s for connection in self._connections.values() for s in connection.sockets)]

    def close(self) -> None:
        """See `Role.close`."""
        for connection in self._connections.values():
            connection.close()
        super().close()

    def _overdue(self, remote: _Remote, now: float) -> str | None:
        """What has taken too long; None while there is time. A prompt that is computed may wait for pages here."""
        silent, patience, deadline = now - remote.heard, self.config.patience_seconds, self.config.prompt_seconds
        if remote.accepted is None:
            return f"the prompt was not taken for {patience:g} s" if silent > patience else None
        if not remote.computed:
            return f"the prompt was not computed for {deadline:g} s" if silent > deadline else None
        return f"sent nothing for {patience:g} s" if remote.fetch and silent > patience else None

    def _ask(self, remote: _Remote) -> None:
        """Have the prompt computed by the next instance that may be there, at last by this one."""
        request = remote.request
        while remote.others:
            connection = self._connection(remote.others.pop(0))
            if connection.open():
                remote.connection, remote.sent, remote.heard = connection, next(self._numbers), time.monotonic()
                self._by_sent[remote.sent] = remote
                tokens = [*request.prompt_token_ids, *request.output_token_ids][:-1]
                connection.send(messages.Prefill(remote.sent, tokens))
                return
        del self._remotes[request.request_id]
        if self._desk is not None:
            self._desk.begin(request, None)

    def _connection(self, address: str) -> Connection:
        if address not in self._connections:
            if len(self._connections) >= _MAX_CONNECTIONS:
                used = {remote.connection for remote in self._remotes.values()}
                for idle in [known for known, connection in self._connections.items() if connection not in used]:
                    self._connections.pop(idle).close()
            check, patience = partial(problem_of, ours=self._parts), self.config.patience_seconds
            self._connections[address] = Connection(
                address, self.card.format, patience, self._token, self._context, check
            )
        return self._connections[address]

    def _hear(self, connection: Connection) -> None:
        for message in connection.receive():
            self._obey(connection, message)
        if connection.problem is not None:
            problem, connection.problem = connection.problem, None
            _LOG.warning("prefill instance %s %s", connection.address, problem)
            for remote in [r for r in self._remotes.values() if r.connection is connection]:
                self._retry(remote, problem)

    def _obey(self, connection: Connection, message: messages.ToDecode) -> None:
        remote = self._by_sent.get(getattr(message, "number", 0))
        if remote is None or remote.connection is not connection:
            return
        match message:
            case messages.Accepted(_, request) if connection.source is not None and self._desk is not None:
                taken = {r.accepted for r in self._remotes.values() if r.connection is connection}
                if remote.accepted is not None or request in taken:
                    connection.refuse(f"calls two prompts {one_line(request)}, or one prompt twice")
                    return
                remote.accepted = request
                self._desk.begin(remote.request, replace(connection.source, request=request))
            case messages.Computed():
                remote.computed, remote.heard = True, time.monotonic()
            case messages.Ended(_, reason):
                self._retry(remote, one_line(reason))

    def _arrived(self, remote: _Remote, rank: int, received: int) -> None:
        remote.arrived.add(rank)
        remote.received += received
        remote.heard = time.monotonic()
        if len(remote.arrived) < self._ranks or remote.fetch is None or self._desk is None:
            return
        self.counters.fetched += 1
        self.counters.tokens += remote.fetch.stop - remote.fetch.start
        self.counters.bytes += remote.received
        self._desk.arrived(remote.request.request_id)
        del self._remotes[remote.request.request_id]
        self._leave(remote)

    def _retry(self, remote: _Remote, reason: str) -> None:
        """Begin again elsewhere: what has arrived is given up with its pages."""
        _LOG.warning("request %s: its prompt is computed elsewhere: %s", remote.request.request_id, reason)
        self.counters.retried += 1
        self._leave(remote)
        if remote.accepted is not None and self._desk is not None:
            self._desk.leave(remote.request.request_id)
        again = self._remotes[remote.request.request_id] = _Remote(remote.request, remote.others)
        self._ask(again)

    def _leave(self, remote: _Remote) -> None:
        """The prefill instance can let go of it."""
        if remote.connection is not None:
            remote.connection.send(messages.Release(remote.sent))
        self._by_sent.pop(remote.sent, None)
        if remote.fetch is not None:
            self._by_fetch.pop(remote.fetch.number, None)
