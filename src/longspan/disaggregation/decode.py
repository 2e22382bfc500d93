"""The role of a decode instance: it has prompts computed by prefill instances and fetches their pages.

It owns the choice of the prefill instance for each prompt, and what follows when one fails: the next one is tried, and
at last the prompt is computed here. The scheduler places the pages, the ranks fill them.
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
from longspan.disaggregation.driver import CoreHandle, Role
from longspan.disaggregation.layout_map import problem_of
from longspan.disaggregation.messages import Format
from longspan.plan.plan import Fetch, StepPlan
from longspan.plan.source import Part
from longspan.request import CoreRequest

_MAX_CONNECTIONS = 64
_LOG = logging.getLogger("longspan.disaggregation")
CachedTokens = Callable[["CoreRequest"], int]


@dataclass(eq=False)
class _RemotePrefill:
    """A request whose prompt is computed by a prefill instance."""

    request: CoreRequest
    # addresses of prefill instances that have not been tried, in order
    candidates: list[str]
    # connection to the instance that computes it
    connection: Connection | None = None
    # the prompt's number in the messages on this connection
    number: int = 0
    # its id in that instance; None until `Accepted`
    remote_id: str | None = None
    # whether that instance has computed all of its pages
    computed: bool = False
    # when it was last sent, accepted, computed or planned, or pages arrived, by `time.monotonic()`
    progress_at: float = 0.0
    # the fetch that the ranks carry out; None before it is planned
    fetch: Fetch | None = None
    # ranks that have received their part of the fetch
    ranks_done: set[int] = field(default_factory=set)
    # bytes of KV that these ranks received
    received: int = 0


class DecodeRole(Role):
    """The decode side, see `Role`.

    `parts` is what each of this instance's ranks stores. `cached` returns the number of a request's tokens that the
    prefix cache has.
    """

    def __init__(
        self, config: TransferConfig, page_format: Format, parts: tuple[Part, ...], cached: CachedTokens, page_size: int
    ) -> None:
        super().__init__(config, page_format)
        self._parts = parts
        self._token = config.token
        self._own_peers = deque(config.prefill_peers)
        self._cached = cached
        self._page_size = page_size
        self._ranks = 0
        self._connections: dict[str, Connection] = {}
        self._prefills: dict[str, _RemotePrefill] = {}  # by request id
        self._by_number: dict[int, _RemotePrefill] = {}
        self._by_fetch: dict[int, _RemotePrefill] = {}  # by number of the fetch
        self._numbers = count(1)

    def start(self, core: CoreHandle, ranks: int) -> None:
        """See `Role.start`."""
        self._core, self._ranks = core, ranks

    def add(self, request: CoreRequest) -> bool:
        """See `Role.add`. A prompt is computed here if the prefix cache has all but a page of it.

        A request that names no prefill instances uses the configured ones in turn.
        """
        known = len(request.prompt_token_ids) + len(request.output_token_ids) - 1
        scored = request.params.prompt_logprobs is not None  # needs logits of every prompt token, not only KV
        salted = request.params.cache_salt != ""  # a prefill instance would share its pages with all requests
        peers = request.prefill_at or self._own_peers
        if not peers or scored or salted or known - self._cached(request) <= self._page_size:
            return False
        prefill = self._prefills[request.request_id] = _RemotePrefill(request, list(peers))
        if peers is self._own_peers:
            self._own_peers.rotate(-1)
        self._send_prompt(prefill)
        return True

    def submitted(self, plan: StepPlan) -> None:
        """See `Role.submitted`. From now on the ranks fetch the pages of the plan's fetches."""
        for fetch in plan.fetches:
            prefill = self._prefills[fetch.request_id]
            prefill.fetch, prefill.progress_at = fetch, time.monotonic()
            self._by_fetch[fetch.number] = prefill

    def finish(self, request_id: str) -> None:
        """See `Role.finish`."""
        prefill = self._prefills.pop(request_id, None)
        if prefill is not None:
            self._release(prefill)

    def poll(self) -> None:
        """See `Role.poll`."""
        for message in self._control.from_ranks():
            match message:
                case messages.FetchProgress(fetch) if fetch in self._by_fetch:
                    self._by_fetch[fetch].progress_at = time.monotonic()
                case messages.FetchDone(rank, fetch, received) if fetch in self._by_fetch:
                    self._rank_done(self._by_fetch[fetch], rank, received)
                case messages.FetchFailed(rank, fetch, reason) if fetch in self._by_fetch:
                    self._retry(self._by_fetch[fetch], f"rank {rank}: {one_line(reason)}")
        for connection in list(self._connections.values()):
            self._receive(connection)
        now = time.monotonic()
        for prefill in list(self._prefills.values()):
            if problem := self._timed_out(prefill, now):
                self._retry(prefill, problem)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """See `Role.sockets`."""
        return [*super().sockets, *(s for connection in self._connections.values() for s in connection.sockets)]

    def close(self) -> None:
        """See `Role.close`."""
        for connection in self._connections.values():
            connection.close()
        super().close()

    def _timed_out(self, prefill: _RemotePrefill, now: float) -> str | None:
        """Which time limit has passed; None if none has.

        There is no limit between the last computed page and the plan of the fetch, when the request waits for free
        pages of this instance.
        """
        waited, timeout, longest = now - prefill.progress_at, self.config.patience_seconds, self.config.prompt_seconds
        if prefill.remote_id is None:
            return f"the prompt was not accepted for {timeout:g} s" if waited > timeout else None
        if not prefill.computed:
            return f"the prompt was not computed for {longest:g} s" if waited > longest else None
        return f"no pages arrived for {timeout:g} s" if prefill.fetch and waited > timeout else None

    def _send_prompt(self, prefill: _RemotePrefill) -> None:
        """Send a prompt to the next prefill instance whose connection can be opened; if there is none, compute it here.

        The last token is not sent: this instance computes it, for the first logits.
        """
        request = prefill.request
        while prefill.candidates:
            connection = self._connection(prefill.candidates.pop(0))
            if connection.open():
                prefill.connection, prefill.number = connection, next(self._numbers)
                prefill.progress_at = time.monotonic()
                self._by_number[prefill.number] = prefill
                tokens = [*request.prompt_token_ids, *request.output_token_ids][:-1]
                connection.send(messages.Prefill(prefill.number, tokens))
                return
        del self._prefills[request.request_id]
        if self._core is not None:
            self._core.begin(request, None)

    def _connection(self, address: str) -> Connection:
        """The connection to an address. Above `_MAX_CONNECTIONS` those without requests are closed first."""
        if address not in self._connections:
            if len(self._connections) >= _MAX_CONNECTIONS:
                used = {prefill.connection for prefill in self._prefills.values()}
                for idle in [known for known, connection in self._connections.items() if connection not in used]:
                    self._connections.pop(idle).close()
            check, timeout = partial(problem_of, ours=self._parts), self.config.patience_seconds
            self._connections[address] = Connection(
                address, self.info.format, timeout, self._token, self._context, check
            )
        return self._connections[address]

    def _receive(self, connection: Connection) -> None:
        """Handle the messages on a connection. If it has failed, retry its prompts elsewhere."""
        for message in connection.receive():
            self._handle(connection, message)
        if connection.problem is not None:
            problem, connection.problem = connection.problem, None
            _LOG.warning("prefill instance %s %s", connection.address, problem)
            for prefill in [p for p in self._prefills.values() if p.connection is connection]:
                self._retry(prefill, problem)

    def _handle(self, connection: Connection, message: messages.ToDecode) -> None:
        prefill = self._by_number.get(getattr(message, "number", 0))
        if prefill is None or prefill.connection is not connection:
            return
        match message:
            case messages.Accepted(_, remote_id) if connection.source is not None and self._core is not None:
                used = {p.remote_id for p in self._prefills.values() if p.connection is connection}
                if prefill.remote_id is not None or remote_id in used:
                    connection.refuse(f"gave two prompts the id {one_line(remote_id)}, or accepted a prompt twice")
                    return
                prefill.remote_id = remote_id
                self._core.begin(prefill.request, replace(connection.source, request=remote_id))
            case messages.Computed():
                prefill.computed, prefill.progress_at = True, time.monotonic()
                self._complete(prefill)
            case messages.PrefillFailed(_, reason):
                self._retry(prefill, one_line(reason))

    def _rank_done(self, prefill: _RemotePrefill, rank: int, received: int) -> None:
        """Record that a rank has received its part."""
        prefill.ranks_done.add(rank)
        prefill.received += received
        prefill.progress_at = time.monotonic()
        self._complete(prefill)

    def _complete(self, prefill: _RemotePrefill) -> None:
        """Let the request decode, once all ranks have received their parts and the instance has reported the prompt.

        The ranks may be first. What the instance sent about the prompt before its report has been read by then, so
        that invalid messages among it are found whatever the order in which the two arrive.
        """
        done = prefill.computed and len(prefill.ranks_done) == self._ranks
        if not done or prefill.fetch is None or self._core is None:
            return
        self.counters.fetched += 1
        self.counters.tokens += prefill.fetch.stop - prefill.fetch.start
        self.counters.bytes += prefill.received
        self._core.arrived(prefill.request.request_id)
        del self._prefills[prefill.request.request_id]
        self._release(prefill)

    def _retry(self, prefill: _RemotePrefill, reason: str) -> None:
        """Send the prompt to the next prefill instance. Its pages here are freed, with the KV that has arrived."""
        _LOG.warning("request %s: its prompt is computed elsewhere: %s", prefill.request.request_id, reason)
        self.counters.retried += 1
        self._release(prefill)
        if prefill.remote_id is not None and self._core is not None:
            self._core.remove(prefill.request.request_id)
        again = self._prefills[prefill.request.request_id] = _RemotePrefill(prefill.request, prefill.candidates)
        self._send_prompt(again)

    def _release(self, prefill: _RemotePrefill) -> None:
        """Let the prefill instance free the prompt's pages, and ignore further messages about it."""
        if prefill.connection is not None:
            prefill.connection.send(messages.Release(prefill.number))
        self._by_number.pop(prefill.number, None)
        if prefill.fetch is not None:
            self._by_fetch.pop(prefill.fetch.number, None)
