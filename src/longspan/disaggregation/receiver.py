"""A decode rank's side of a transfer: requests the tokens that it stores, and writes them into its pool.

It owns the blocks in flight to this rank and their number; it must not decide what is fetched, nor from which instance.
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
from longspan.disaggregation.authentication import LARGEST_MESSAGE
from longspan.disaggregation.layout_map import are_in_order, cells, runs_on
from longspan.disaggregation.pool_access import PoolAccess
from longspan.disaggregation.pulls import Pull, PullTracker
from longspan.disaggregation.worker import TableOf, TransferThread
from longspan.plan.plan import Fetch, StepPlan
from longspan.plan.source import Extent, Part

_PROGRESS_SECONDS = 1.0
_MAX_SOCKETS = 256


@dataclass(eq=False)
class _ActiveFetch:
    """A fetch that this rank carries out."""

    fetch: Fetch
    # the request's pages
    table: PageTable
    # which of its tokens are missing, requested or received
    pulls: PullTracker
    # bytes of KV that have arrived
    received: int = 0
    # when progress was last reported to the driver, by `time.monotonic()`
    reported_at: float = field(default_factory=time.monotonic)


class PageReceiver(TransferThread):
    """See `TransferThread`.

    It writes only slots of requests that are being fetched, which no step reads or writes. A plan that ends a fetch
    waits, in `apply`, until the block that is being written is complete. An error in a fetch ends that fetch only.
    """

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        super().__init__(part, access, config)
        self.received = 0  # bytes of KV, over all fetches
        self._new: list[tuple[Fetch, PageTable]] = []  # planned, not yet seen by this thread
        self._writable: dict[str, int] = {}  # by request id, the number of the fetch that may write its slots
        self._active: dict[int, _ActiveFetch] = {}  # by number of the fetch
        self._in_flight: dict[int, tuple[_ActiveFetch, Pull]] = {}  # requested blocks, by number of the block
        self._blocks = count()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}  # by address of a prefill rank
        self._poller = zmq.Poller()
        self._poller.register(self._wake_receiver, zmq.POLLIN)
        self._thread.start()

    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """See `TransferThread.apply`."""
        if plan.fetches:
            self._access.mark()  # first: kernels of earlier steps may still use the slots that will be written
        with self._lock:
            ended = [self._writable.pop(request_id, None) for request_id in plan.finished]
            for fetch in plan.fetches:
                self._writable[fetch.request_id] = fetch.number
                self._new.append((fetch, table_of(fetch.request_id)))
        if plan.fetches or any(number is not None for number in ended):
            self.wake()

    def computed(self, plan: StepPlan) -> None:
        """See `TransferThread.computed`. Nothing to do: computed tokens are not sent from here."""

    def _on_wake(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            writable = set(self._writable.values())
        for active in [a for a in self._active.values() if a.fetch.number not in writable]:
            self._forget(active)
            self._close_unused(active.fetch)
        for fetch, table in new:
            if fetch.number in writable:
                with self._failing_only(fetch):
                    self._begin(fetch, table)
        self._request_blocks()

    def _begin(self, fetch: Fetch, table: PageTable) -> None:
        """Subscribe to the prefill ranks that have tokens for this rank."""
        source = fetch.source
        parts, wanted = cells(self._part, source.parts), runs_on(table, self._part.shard, fetch.start, fetch.stop)
        limits = [max(1, self._config.block_bytes // (cell.rows * self._access.token_bytes)) for cell in parts]
        active = self._active[fetch.number] = _ActiveFetch(fetch, table, PullTracker(parts, wanted, limits))
        for rank in active.pulls.ranks:
            self._socket(source.addresses[rank]).send(messages.encode(messages.Subscribe(source.epoch, source.request)))
        self._end_if_done(active)

    def _process_messages(self) -> None:
        self._poller.poll()
        for address, socket in list(self._sockets.items()):
            # handling a message may close the socket
            while self._sockets.get(address) is socket and socket.poll(0):
                self._handle(address, socket.recv_multipart(copy=False))
        self._request_blocks()

    def _handle(self, address: str, frames: Sequence[zmq.Frame]) -> None:
        match messages.decode(frames[0].bytes, messages.ToReceiver):
            case messages.Available(epoch, request, runs):
                for active in self._fetches_from(address):
                    if (epoch, request) == (active.fetch.source.epoch, active.fetch.source.request):
                        with self._failing_only(active.fetch):
                            self._offer(active, address, runs)
            case messages.PageBlock(block) if len(frames) == 2 and self._is_expected(address, block):
                active, pull = self._in_flight.pop(block)
                with self._failing_only(active.fetch):
                    self._store(active, pull, frames[1])
            case messages.Missing(block) if self._is_expected(address, block):
                active, pull = self._in_flight.pop(block)
                active.pulls.refused(pull)
            case None:
                for active in self._fetches_from(address):
                    self._fail(active.fetch, f"{address} sends messages of another protocol")

    def _fetches_from(self, address: str) -> list[_ActiveFetch]:
        """The active fetches whose source has a rank at this address."""
        return [active for active in self._active.values() if address in active.fetch.source.addresses]

    def _is_expected(self, address: str, block: int) -> bool:
        """Whether a block is in flight from this address."""
        active, pull = self._in_flight.get(block, (None, None))
        return active is not None and pull is not None and active.fetch.source.addresses[pull.rank] == address

    def _offer(self, active: _ActiveFetch, address: str, runs: Sequence[Extent]) -> None:
        if not are_in_order(runs):
            raise ValueError(f"{address} reports runs of positions that are empty or not in order")
        active.pulls.offer(active.fetch.source.addresses.index(address), runs)

    def _store(self, active: _ActiveFetch, pull: Pull, frame: zmq.Frame) -> None:
        """Write a block into the pool, unless its request has ended."""
        rows = (pull.layers[1] - pull.layers[0]) * (pull.heads[1] - pull.heads[0]) * pull.tokens
        if len(frame) != rows * self._access.token_bytes:
            raise ValueError(f"a block has {len(frame)} bytes instead of {rows * self._access.token_bytes}")
        whole = torch.frombuffer(bytearray(frame.buffer), dtype=torch.uint8)
        with self._lock:
            if self._writable.get(active.fetch.request_id) != active.fetch.number:
                return
            spans = [s for start, stop in pull.runs for _, s in active.table.slots(self._part.shard, start, stop)]
            self._access.write(pull.layers, pull.heads, spans, whole)
        active.received += whole.numel()
        self.received += whole.numel()
        active.pulls.received(pull)
        if time.monotonic() - active.reported_at > _PROGRESS_SECONDS:
            active.reported_at = time.monotonic()
            self._report(messages.FetchProgress(active.fetch.number))
        self._end_if_done(active)

    def _request_blocks(self) -> None:
        """Request as many blocks as may be in flight, for the oldest fetches first."""
        for active in list(self._active.values()):
            with self._failing_only(active.fetch):
                self._request_blocks_of(active)

    def _request_blocks_of(self, active: _ActiveFetch) -> None:
        source = active.fetch.source
        while len(self._in_flight) < self._config.max_blocks and (pull := active.pulls.next()):
            block = next(self._blocks)
            self._in_flight[block] = (active, pull)
            request = messages.PageRequest(source.epoch, block, source.request, pull.layers, pull.heads, pull.runs)
            self._socket(source.addresses[pull.rank]).send(messages.encode(request))

    def _end_if_done(self, active: _ActiveFetch) -> None:
        if active.pulls.done:
            self._end(active.fetch)
            self._report(messages.FetchDone(self._part.rank, active.fetch.number, active.received))

    @contextmanager
    def _failing_only(self, fetch: Fetch) -> Iterator[None]:
        """An exception in the block fails this fetch and is not raised further, so that other fetches go on."""
        try:
            yield
        except Exception as error:
            self._fail(fetch, f"{type(error).__name__}: {error}")

    def _fail(self, fetch: Fetch, reason: str) -> None:
        self._end(fetch)
        self._close_unused(fetch)
        self._report(messages.FetchFailed(self._part.rank, fetch.number, reason))

    def _end(self, fetch: Fetch) -> None:
        """End a fetch: its slots are not written any more."""
        with self._lock:
            if self._writable.get(fetch.request_id) == fetch.number:
                del self._writable[fetch.request_id]
        active = self._active.get(fetch.number)
        if active is not None:
            self._forget(active)

    def _forget(self, active: _ActiveFetch) -> None:
        """Remove a fetch, unsubscribe, and no longer count its blocks as in flight, since they may never arrive."""
        source = active.fetch.source
        del self._active[active.fetch.number]
        self._in_flight = {block: entry for block, entry in self._in_flight.items() if entry[0] is not active}
        for address in {source.addresses[rank] for rank in active.pulls.ranks} & self._sockets.keys():
            self._sockets[address].send(messages.encode(messages.Unsubscribe(source.epoch, source.request)))

    def _socket(self, address: str) -> zmq.Socket[bytes]:
        """The socket to a prefill rank, opened if needed. Above `_MAX_SOCKETS` unused ones are closed first."""
        if address not in self._sockets:
            if len(self._sockets) >= _MAX_SOCKETS:
                self._close([a for a in self._sockets if a not in self._used()])
            socket = self._context.socket(zmq.DEALER)
            socket.set_hwm(0)  # a bounded number of small messages
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
        """Close the sockets to a fetch's source that no fetch uses: the instance may have ended."""
        self._close([address for address in fetch.source.addresses if address not in self._used()])

    def _used(self) -> set[str]:
        """Addresses of the sources of active fetches."""
        return {address for active in self._active.values() for address in active.fetch.source.addresses}

    def _close(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            socket = self._sockets.pop(address, None)
            if socket is not None:
                self._poller.unregister(socket)
                socket.close(linger=0)
