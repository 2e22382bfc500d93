"""A prefill instance that computes nothing: it sends replies that a test gives it, and zeros for keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Thread
from typing import Any

import msgspec
import zmq

from longspan.disaggregation.handshake import parts_of
from longspan.disaggregation.messages import (
    Accepted,
    Available,
    Computed,
    Hello,
    PageBlock,
    PageRequest,
    Prefill,
    Subscribe,
    ToPrefill,
    ToSender,
    Welcome,
    encode,
)
from longspan.engine.setup import EngineSetup
from longspan.plan.source import Part, Source

EPOCH = "fake"


@dataclass
class FakePeer:
    """Its replies. Each may be replaced by another message, or by bytes that are not a valid one."""

    # what its ranks claim to store
    parts: tuple[Part, ...]
    # bytes of one token in one layer and KV head
    token_bytes: int
    # from its true source, the one that it sends in `Welcome`
    welcome: Callable[[Source], Source | bytes] = lambda source: source
    # the replies to `Prefill`
    accept: Callable[[int, str], list[Any]] = lambda number, request: [Accepted(number, request)]
    # the reply of a rank to `Subscribe`
    available: Callable[[str], Any] = lambda request: Available(EPOCH, request, [(0, 1 << 20)])
    # from zeros of the right length, the bytes of a block
    block: Callable[[bytes], bytes] = lambda zeros: zeros
    # whether it sends `Computed`
    computes: bool = True
    # number of `Hello` messages received
    hellos: int = 0
    address: str = ""
    source: Source = field(init=False)

    def serve(self, context: zmq.Context) -> None:
        driver, rank = (context.socket(zmq.ROUTER) for _ in range(2))
        self.address, there = (f"tcp://127.0.0.1:{s.bind_to_random_port('tcp://127.0.0.1')}" for s in (driver, rank))
        self.source = Source(EPOCH, (there,) * len(self.parts), self.parts)
        Thread(target=self._run, args=(driver, rank), daemon=True).start()

    def _run(self, driver: zmq.Socket, rank: zmq.Socket) -> None:
        poller, requests = zmq.Poller(), (f"fake-{number}" for number in count())
        for socket in (driver, rank):
            poller.register(socket, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                for socket, answers in (
                    (driver, lambda data: self._driver_replies(data, requests)),
                    (rank, self._rank_replies),
                ):
                    if socket in ready:
                        peer, data = socket.recv_multipart()
                        for answer in answers(data):
                            socket.send_multipart([peer, *answer])
        except zmq.ZMQError:  # the test is over
            for socket in (driver, rank):
                socket.close(linger=0)

    def _driver_replies(self, data: bytes, requests: Iterator[str]) -> Iterator[list[bytes]]:
        match msgspec.msgpack.decode(data, type=ToPrefill):
            case Hello():
                self.hellos += 1
                source = self.welcome(self.source)
                yield [source if isinstance(source, bytes) else encode(Welcome(source))]
            case Prefill(number):
                for message in (*self.accept(number, next(requests)), *([Computed(number)] if self.computes else ())):
                    yield [encode(message)]

    def _rank_replies(self, data: bytes) -> Iterator[list[bytes]]:
        match msgspec.msgpack.decode(data, type=ToSender):
            case Subscribe(_, request):
                reply = self.available(request)
                yield [reply if isinstance(reply, bytes) else encode(reply)]
            case PageRequest(_, block, _, layers, heads, runs):
                rows = (layers[1] - layers[0]) * (heads[1] - heads[0]) * sum(stop - start for start, stop in runs)
                yield [encode(PageBlock(block)), self.block(bytes(rows * self.token_bytes))]


@contextmanager
def fake_peer(setup: EngineSetup, **answers: Any) -> Iterator[FakePeer]:
    """Listens within the block, as an instance of one rank whose format and layout fit the setup's."""
    whole = parts_of(setup)
    part = Part(0, 0, (0, max(p.layers[1] for p in whole)), (0, max(p.heads[1] for p in whole)))
    peer = FakePeer((part,), setup.layout.kv_factor * setup.layout.row_bytes, **answers)
    context = zmq.Context()
    try:
        peer.serve(context)
        yield peer
    finally:
        context.destroy(linger=0)


def with_part(source: Source, **values: Any) -> Source:
    """The source with other values in its one part."""
    return replace(source, parts=(replace(source.parts[0], **values),))
