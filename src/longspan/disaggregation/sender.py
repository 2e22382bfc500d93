"""A prefill rank's side of a transfer: says which tokens it has, and sends those it is asked for.

It owns the requests that others may ask for; it must not know who computes them when, nor where they go.
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
from longspan.disaggregation.worker import TableOf, TransferThread, decoded
from longspan.plan.plan import StepPlan
from longspan.plan.source import Part

_LARGEST_QUESTION = 1 << 22  # runs of positions are the most of it
_MAX_WATCHERS = 1 << 16
_LOG = logging.getLogger("longspan.disaggregation")


@dataclass
class _Served:
    """A request that others may ask for; positions before `computed` are in the pools."""

    table: PageTable
    num_prompt: int
    computed: int


@dataclass
class _Watcher:
    """Who wants to hear of a request: told of positions before `told` of this `table`."""

    table: PageTable | None = None
    told: int = 0


class PageSender(TransferThread):
    """See `TransferThread`. A computed page is not written again while its request has it, so it is read at any time;
    what ends a request waits for the block that is being read."""

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        super().__init__(part, access, config)
        self._served: dict[str, _Served] = {}
        self._watchers: OrderedDict[tuple[bytes, str], _Watcher] = OrderedDict()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)  # a receiver asks for a bounded number of blocks
        self._socket.maxmsgsize = _LARGEST_QUESTION  # anybody may ask: without a request's name there is no answer
        port = self._socket.bind_to_random_port(f"tcp://{config.host}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)
        self._tell(messages.Serving(part.rank, f"tcp://{config.host}:{port}"))
        self._thread.start()

    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """See `TransferThread.apply`."""
        with self._lock:
            for request_id in plan.finished:
                self._served.pop(request_id, None)
            for admission in plan.admitted:
                if admission.for_peer:
                    table = table_of(admission.request_id)
                    cached = len(admission.pages) * table.page_size
                    self._served[admission.request_id] = _Served(table, admission.num_prompt, cached)

    def computed(self, plan: StepPlan) -> None:
        """See `TransferThread.computed`."""
        news = False
        for segment in plan.segments:
            served = self._served.get(segment.request_id)
            if served is not None:
                served.computed = max(served.computed, segment.stop)
                news = True
        if news:
            self._access.mark()
            self.wake()

    def _woke(self) -> None:
        for (peer, request), watcher in self._watchers.items():
            self._announce(peer, request, watcher)

    def _listen(self) -> None:
        self._poller.poll()
        while self._socket.poll(0):
            peer, *_, data = self._socket.recv_multipart()
            match decoded(data, messages.ToSender):
                case messages.Watch(epoch, request) if epoch == self._config.epoch:
                    watcher = self._watchers[peer, request] = _Watcher()
                    self._announce(peer, request, watcher)
                    if len(self._watchers) > _MAX_WATCHERS:
                        self._watchers.popitem(last=False)
                case messages.Unwatch(_, request):
                    self._watchers.pop((peer, request), None)
                case messages.PageRequest() as ask:
                    self._answer(peer, ask)
                case _:  # of another life of this instance, or no message at all
                    continue

    def _announce(self, peer: bytes, request: str, watcher: _Watcher) -> None:
        """Tell of what is new; a request that had to start over is told of from its beginning."""
        with self._lock:
            served = self._served.get(request)
            if served is None:
                return
            if watcher.table is not served.table:
                watcher.table, watcher.told = served.table, 0
            stop = min(served.computed, served.num_prompt)
            if stop <= watcher.told or (stop < served.num_prompt and not self._config.overlap):
                return
            runs = runs_on(served.table, self._part.shard, watcher.told, stop)
            watcher.told = stop
        if runs:
            self._send(peer, messages.Have(self._config.epoch, request, runs))

    def _answer(self, peer: bytes, ask: messages.PageRequest) -> None:
        block = None
        try:
            with self._lock:
                spans = self._spans(ask)
                block = self._access.read(ask.layers, ask.heads, spans) if spans else None
        except Exception as error:  # of one question: others go on
            _LOG.warning("request %s: a block cannot be read: %s: %s", ask.request, type(error).__name__, error)
        if block is None:
            self._send(peer, messages.Missing(ask.block))
        else:
            self._socket.send_multipart(
                [peer, messages.encode(messages.PageBlock(ask.block)), block.numpy().data], copy=False
            )

    def _spans(self, ask: messages.PageRequest) -> list[Span]:
        """The slots of what is asked for; none unless all of it is here."""
        served = self._served.get(ask.request)
        (low, high), (first, last) = self._part.layers, self._part.heads
        inside = low <= ask.layers[0] < ask.layers[1] <= high and first <= ask.heads[0] < ask.heads[1] <= last
        if served is None or ask.epoch != self._config.epoch or not inside or not are_in_order(ask.runs):
            return []
        found: list[Span] = []
        for start, stop in ask.runs:
            if stop > served.computed:
                return []
            spans = [span for _, span in served.table.slots(self._part.shard, start, stop)]
            if sum(span.length for span in spans) != stop - start:
                return []
            found += spans
        return found

    def _send(self, peer: bytes, message: messages.ToReceiver) -> None:
        self._socket.send_multipart([peer, messages.encode(message)])
