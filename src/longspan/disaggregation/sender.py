"""A prefill rank's side of a transfer: reports which tokens are computed, and sends the blocks that are requested.

It owns which requests may be read by other instances; it must not know when they are computed, nor where blocks go.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

import zmq

from longspan.cache.pages import PageTable, Span
from longspan.config import TransferConfig
from longspan.disaggregation import messages
from longspan.disaggregation.layout_map import are_in_order, runs_on
from longspan.disaggregation.pool_access import PoolAccess
from longspan.disaggregation.worker import TableOf, TransferThread
from longspan.plan.plan import StepPlan
from longspan.plan.source import Part

_LARGEST_REQUEST = 1 << 22  # bytes; a request consists mostly of runs of positions
_MAX_SUBSCRIPTIONS = 1 << 16
_LOG = logging.getLogger("longspan.disaggregation")


@dataclass
class _Readable:
    """A request whose pages other instances may read."""

    # its pages; a request that was preempted gets another table
    table: PageTable
    # tokens of its prompt
    num_prompt: int
    # positions before this one are in the pools
    computed: int


@dataclass
class _Subscription:
    """What a decode rank has been sent about a request."""

    # the table of the positions that were reported; None if none were
    table: PageTable | None = None
    # positions before this one were reported
    reported: int = 0


class PageSender(TransferThread):
    """See `TransferThread`.

    A computed page is not written again while its request has it, so blocks can be read at any time. A plan that ends a
    request waits, in `apply`, until the block that is being read is complete.
    """

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        super().__init__(part, access, config)
        self._readable: dict[str, _Readable] = {}  # by request id
        self._subscriptions: OrderedDict[tuple[bytes, str], _Subscription] = OrderedDict()  # by peer and request id
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)  # a receiver requests a bounded number of blocks
        self._socket.maxmsgsize = _LARGEST_REQUEST  # any peer may connect; a request's id is needed to read its pages
        port = self._socket.bind_to_random_port(f"tcp://{config.host}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_receiver, zmq.POLLIN)
        self._report(messages.SenderReady(part.rank, f"tcp://{config.host}:{port}"))
        self._thread.start()

    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """See `TransferThread.apply`."""
        with self._lock:
            for request_id in plan.finished:
                self._readable.pop(request_id, None)
            for admission in plan.admitted:
                if admission.for_peer:
                    table = table_of(admission.request_id)
                    cached = len(admission.pages) * table.page_size
                    self._readable[admission.request_id] = _Readable(table, admission.num_prompt, cached)

    def computed(self, plan: StepPlan) -> None:
        """See `TransferThread.computed`."""
        # without the lock: only the rank's thread adds and removes requests, and `computed` only grows
        found = [(self._readable.get(segment.request_id), segment.stop) for segment in plan.segments]
        if any(readable for readable, _ in found):
            self._access.mark()  # first: who sees the new `computed` must read behind the step's kernels
            for readable, stop in found:
                if readable is not None:
                    readable.computed = max(readable.computed, stop)
            self.wake()

    def _on_wake(self) -> None:
        for (peer, request), subscription in self._subscriptions.items():
            self._report_tokens(peer, request, subscription)

    def _process_messages(self) -> None:
        self._poller.poll()
        while self._socket.poll(0):
            peer, *_, data = self._socket.recv_multipart()
            match messages.decode(data, messages.ToSender):
                case messages.Subscribe(epoch, request) if epoch == self._config.epoch:
                    subscription = self._subscriptions[peer, request] = _Subscription()
                    self._report_tokens(peer, request, subscription)
                    if len(self._subscriptions) > _MAX_SUBSCRIPTIONS:  # of peers that have gone: drop the oldest
                        self._subscriptions.popitem(last=False)
                case messages.Unsubscribe(_, request):
                    self._subscriptions.pop((peer, request), None)
                case messages.PageRequest() as request:
                    self._send_block(peer, request)
                case _:  # of an earlier epoch, or not a valid message
                    continue

    def _report_tokens(self, peer: bytes, request: str, subscription: _Subscription) -> None:
        """Send `Available` for tokens that were not reported yet.

        A request that was preempted has a new table; its tokens are reported again from the first on.
        """
        with self._lock:
            readable = self._readable.get(request)
            if readable is None:
                return
            if subscription.table is not readable.table:
                subscription.table, subscription.reported = readable.table, 0
            stop = min(readable.computed, readable.num_prompt)
            is_partial = stop < readable.num_prompt
            if stop <= subscription.reported or (is_partial and not self._config.overlap):
                return
            runs = runs_on(readable.table, self._part.shard, subscription.reported, stop)
            subscription.reported = stop
        if runs:
            self._send(peer, messages.Available(self._config.epoch, request, runs))

    def _send_block(self, peer: bytes, request: messages.PageRequest) -> None:
        """Reply to a request for a block."""
        block = None
        try:
            with self._lock:
                spans = self._spans(request)
                block = self._access.read(request.layers, request.heads, spans) if spans else None
        except Exception as error:  # it concerns one block only, so the thread must go on
            _LOG.warning("request %s: a block cannot be read: %s: %s", request.request, type(error).__name__, error)
        if block is None:
            self._send(peer, messages.Missing(request.block))
        else:
            self._socket.send_multipart(
                [peer, messages.encode(messages.PageBlock(request.block)), block.numpy().data], copy=False
            )

    def _spans(self, request: messages.PageRequest) -> list[Span]:
        """The slots of the requested positions; empty unless this rank has all of them, in these layers and heads."""
        readable = self._readable.get(request.request)
        (low, high), (first, last) = self._part.layers, self._part.heads
        layers, heads = request.layers, request.heads
        inside = low <= layers[0] < layers[1] <= high and first <= heads[0] < heads[1] <= last
        if readable is None or request.epoch != self._config.epoch or not inside or not are_in_order(request.runs):
            return []
        found: list[Span] = []
        for start, stop in request.runs:
            if stop > readable.computed:
                return []
            spans = [span for _, span in readable.table.slots(self._part.shard, start, stop)]
            if sum(span.length for span in spans) != stop - start:  # some are on another shard
                return []
            found += spans
        return found

    def _send(self, peer: bytes, message: messages.ToReceiver) -> None:
        self._socket.send_multipart([peer, messages.encode(message)])
