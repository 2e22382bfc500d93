"""A decode rank's side of a transfer: asks for the tokens it is to store, and puts them into its pool.

It owns what is in flight to this rank and its bound; it must not decide what is fetched nor from whom.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
import zmq

from longspan.cache.pages import PageTable
from longspan.config import TransferConfig
from longspan.disaggregation import messages
from longspan.disaggregation.layout_map import are_in_order, cells, runs_on
from longspan.disaggregation.lock import LARGEST_MESSAGE
from longspan.disaggregation.pool_access import PoolAccess
from longspan.disaggregation.pulls import Pull, Pulls
from longspan.disaggregation.worker import TableOf, TransferThread, decoded
from longspan.plan.plan import Fetch, StepPlan
from longspan.plan.source import Extent, Part

_MOVING_SECONDS = 1.0
_MAX_SOCKETS = 256


@dataclass(eq=False)
class _Fetching:
    """One fetch: `pulls` says what is missing, `table` where it goes."""

    fetch: Fetch
    table: PageTable
    pulls: Pulls
    received: int = 0
    told: float = field(default_factory=time.monotonic)


class PageReceiver(TransferThread):
    """See `TransferThread`. It writes only slots of requests that are being fetched, which no step touches; what ends
    a fetch waits for the block that is being written. What goes wrong with a fetch ends that fetch alone."""

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        super().__init__(part, access, config)
        self.received = 0  # bytes of KV
        self._new: list[tuple[Fetch, PageTable]] = []
        self._live: dict[str, int] = {}  # by request, its fetch: what may still be written
        self._active: dict[int, _Fetching] = {}  # by the fetch's number
        self._in_flight: dict[int, tuple[_Fetching, Pull]] = {}
        self._blocks = count()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._woken, zmq.POLLIN)
        self._thread.start()

    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """See `TransferThread.apply`."""
        with self._lock:
            ended = [self._live.pop(request_id, None) for request_id in plan.finished]
            for fetch in plan.fetches:
                self._live[fetch.request_id] = fetch.number
                self._new.append((fetch, table_of(fetch.request_id)))
        if plan.fetches or any(number is not None for number in ended):
            self._access.mark()
            self.wake()

    def computed(self, plan: StepPlan) -> None:
        """See `TransferThread.computed`: nothing is asked of this side."""

    def _woke(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            live = set(self._live.values())
        for fetching in [f for f in self._active.values() if f.fetch.number not in live]:
            self._forget(fetching)
            self._close_unused(fetching.fetch)
        for fetch, table in new:
            if fetch.number in live:
                with self._failing_alone(fetch):
                    self._begin(fetch, table)
        self._ask()

    def _begin(self, fetch: Fetch, table: PageTable) -> None:
        source = fetch.source
        parts, wanted = cells(self._part, source.parts), runs_on(table, self._part.shard, fetch.start, fetch.stop)
        limits = [max(1, self._config.block_bytes // (cell.rows * self._access.token_bytes)) for cell in parts]
        fetching = self._active[fetch.number] = _Fetching(fetch, table, Pulls(parts, wanted, limits))
        for rank in fetching.pulls.ranks:
            self._socket(source.addresses[rank]).send(messages.encode(messages.Watch(source.life, source.request)))
        self._end_if_done(fetching)

    def _listen(self) -> None:
        self._poller.poll()
        for address, socket in list(self._sockets.items()):
            while self._sockets.get(address) is socket and socket.poll(0):
                self._take(address, socket.recv_multipart(copy=False))
        self._ask()

    def _take(self, address: str, frames: Sequence[zmq.Frame]) -> None:
        match decoded(frames[0].bytes, messages.ToReceiver):
            case messages.Have(life, request, runs):
                for fetching in self._from(address):
                    if (life, request) == (fetching.fetch.source.life, fetching.fetch.source.request):
                        with self._failing_alone(fetching.fetch):
                            self._offer(fetching, address, runs)
            case messages.Block(block) if len(frames) == 2 and self._was_asked(address, block):
                fetching, pull = self._in_flight.pop(block)
                with self._failing_alone(fetching.fetch):
                    self._store(fetching, pull, frames[1])
            case messages.Missing(block) if self._was_asked(address, block):
                fetching, pull = self._in_flight.pop(block)
                fetching.pulls.refused(pull)
            case None:
                for fetching in self._from(address):
                    self._fail(fetching.fetch, f"{address} speaks another language")

    def _from(self, address: str) -> list[_Fetching]:
        """The fetches that a rank has to do with."""
        return [fetching for fetching in self._active.values() if address in fetching.fetch.source.addresses]

    def _was_asked(self, address: str, block: int) -> bool:
        """Whether a block is still wanted, and of that rank."""
        fetching, pull = self._in_flight.get(block, (None, None))
        return fetching is not None and pull is not None and fetching.fetch.source.addresses[pull.rank] == address

    def _offer(self, fetching: _Fetching, address: str, runs: Sequence[Extent]) -> None:
        if not are_in_order(runs):
            raise ValueError(f"{address} offers positions that cannot be")
        fetching.pulls.offer(fetching.fetch.source.addresses.index(address), runs)

    def _store(self, fetching: _Fetching, pull: Pull, frame: zmq.Frame) -> None:
        rows = (pull.layers[1] - pull.layers[0]) * (pull.heads[1] - pull.heads[0]) * pull.tokens
        if len(frame) != rows * self._access.token_bytes:
            raise ValueError(f"{len(frame)} bytes came where {rows * self._access.token_bytes} were asked for")
        whole = torch.frombuffer(bytearray(frame.buffer), dtype=torch.uint8)
        with self._lock:
            if self._live.get(fetching.fetch.request_id) != fetching.fetch.number:
                return
            spans = [s for start, stop in pull.runs for _, s in fetching.table.slots(self._part.shard, start, stop)]
            self._access.write(pull.layers, pull.heads, spans, whole)
        fetching.received += whole.numel()
        self.received += whole.numel()
        fetching.pulls.arrived(pull)
        if time.monotonic() - fetching.told > _MOVING_SECONDS:
            fetching.told = time.monotonic()
            self._tell(messages.Moving(fetching.fetch.number))
        self._end_if_done(fetching)

    def _ask(self) -> None:
        """As many blocks as may be in flight, for the oldest fetches that have something to ask for."""
        for fetching in list(self._active.values()):
            with self._failing_alone(fetching.fetch):
                self._ask_for(fetching)

    def _ask_for(self, fetching: _Fetching) -> None:
        source = fetching.fetch.source
        while len(self._in_flight) < self._config.max_blocks and (pull := fetching.pulls.next()):
            block = next(self._blocks)
            self._in_flight[block] = (fetching, pull)
            ask = messages.Ask(source.life, block, source.request, pull.layers, pull.heads, pull.runs)
            self._socket(source.addresses[pull.rank]).send(messages.encode(ask))

    def _end_if_done(self, fetching: _Fetching) -> None:
        if fetching.pulls.done:
            self._end(fetching.fetch)
            self._tell(messages.Arrived(self._part.rank, fetching.fetch.number, fetching.received))

    @contextmanager
    def _failing_alone(self, fetch: Fetch) -> Iterator[None]:
        """Whatever goes wrong within is the failure of this fetch."""
        try:
            yield
        except Exception as error:
            self._fail(fetch, f"{type(error).__name__}: {error}")

    def _fail(self, fetch: Fetch, reason: str) -> None:
        self._end(fetch)
        self._close_unused(fetch)
        self._tell(messages.FetchFailed(self._part.rank, fetch.number, reason))

    def _end(self, fetch: Fetch) -> None:
        """Write no more of it."""
        with self._lock:
            if self._live.get(fetch.request_id) == fetch.number:
                del self._live[fetch.request_id]
        fetching = self._active.get(fetch.number)
        if fetching is not None:
            self._forget(fetching)

    def _forget(self, fetching: _Fetching) -> None:
        """Its blocks in flight count no more: they may never come."""
        source = fetching.fetch.source
        del self._active[fetching.fetch.number]
        self._in_flight = {block: entry for block, entry in self._in_flight.items() if entry[0] is not fetching}
        for address in {source.addresses[rank] for rank in fetching.pulls.ranks} & self._sockets.keys():
            self._sockets[address].send(messages.encode(messages.Unwatch(source.life, source.request)))

    def _socket(self, address: str) -> zmq.Socket[bytes]:
        if address not in self._sockets:
            if len(self._sockets) >= _MAX_SOCKETS:  # instances come and go
                self._close([a for a in self._sockets if a not in self._used()])
            socket = self._context.socket(zmq.DEALER)
            socket.set_hwm(0)  # questions only, and a bounded number
            socket.maxmsgsize = max(LARGEST_MESSAGE, 2 * self._config.block_bytes)
            try:
                socket.connect(address)
            except zmq.ZMQError:
                socket.close(linger=0)
                raise
            self._poller.register(socket, zmq.POLLIN)
            self._sockets[address] = socket
        return self._sockets[address]

    def _close_unused(self, fetch: Fetch) -> None:
        """Its instance may be gone for good."""
        self._close([address for address in fetch.source.addresses if address not in self._used()])

    def _used(self) -> set[str]:
        return {address for fetching in self._active.values() for address in fetching.fetch.source.addresses}

    def _close(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            socket = self._sockets.pop(address, None)
            if socket is not None:
                self._poller.unregister(socket)
                socket.close(linger=0)
