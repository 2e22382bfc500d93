"""A rank's side of the connection to its driver: it connects, builds its runner, and carries out plans until it ends.

It owns the order of these steps; it must not know who started the process, nor what a plan contains.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec
import torch
import zmq

from longspan.config import LivenessConfig
from longspan.engine.cores import share_of_cores
from longspan.engine.devices import resolve_device
from longspan.engine.rank.build import build_runner, build_vocabulary
from longspan.engine.rank.loading import TensorStore
from longspan.engine.rank.runner import Runner
from longspan.engine.rank.steps import StepLoop
from longspan.engine.setup import resolve
from longspan.engine.transport import messages
from longspan.engine.transport.connection import (
    connect_to_driver,
    detect_lost_peers,
    open_store,
    own_address,
    use_interface,
)
from longspan.engine.transport.heartbeat import Heartbeat
from longspan.errors import ConfigError
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.trace import Trace
from longspan.parallel.world import join_world, leave_world, open_group
from longspan.plan.plan import StepPlan
from longspan.version import __version__

Reply = Callable[[messages.FromWorker], None]


class Answers:
    """Messages from the thread that waits for results to the one that owns the driver's socket.

    A ZeroMQ socket belongs to one thread, so they pass through a pair of sockets within the process, which can be
    polled together with the driver's.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.arriving = context.socket(zmq.PAIR)
        self._sending = context.socket(zmq.PAIR)
        for end in (self.arriving, self._sending):
            end.set_hwm(0)
        self.arriving.bind("inproc://answers")
        self._sending.connect("inproc://answers")
        self._errors: list[BaseException] = []

    def put(self, message: messages.FromWorker) -> None:
        """Send a message."""
        self._sending.send(msgspec.msgpack.encode(message))

    def fail(self, error: BaseException) -> None:
        """Let `forward` raise an error."""
        self._errors.append(error)
        self._sending.send(b"")

    def forward(self, socket: zmq.Socket[bytes]) -> None:
        """Send what has arrived to the driver. Raises the first error of the other thread."""
        while self.arriving.poll(0):
            if not (message := self.arriving.recv()):
                raise self._errors[0]
            socket.send(message)

    def close(self) -> None:
        """Close both sockets. Call it when the other thread has ended, or when the process is about to."""
        self.arriving.close(linger=0)
        self._sending.close(linger=0)


def serve_driver(address: str, rank: int, world_size: int, device: int = 0) -> bool:
    """Serve the driver at an address until it stops this rank.

    Returns True if the driver has stopped the rank, False if the rank has failed and reported it. `device` is the
    number of this rank's GPU on its host. If the driver disconnects, the process ends at once. Raises `ConfigError` if
    nothing answers at the address, or if the driver refuses this rank.
    """
    with ExitStack() as cleanup:
        cleanup.callback(leave_world)
        context = zmq.Context()
        cleanup.callback(context.destroy, linger=1000)
        socket = context.socket(zmq.DEALER)
        # a full receive queue would also stop ZeroMQ's heartbeats, and a rank in a long step would count as lost
        socket.set_hwm(0)
        detect_lost_peers(socket, LivenessConfig.heartbeat_timeout)
        host = own_address(address)
        store = open_store(host) if rank == 0 and host else None  # ranks of one host use a file instead
        hello = messages.RankHello(rank, world_size, __version__, host, store.port if store else 0)
        first, watch = connect_to_driver(socket, address, msgspec.msgpack.encode(hello))
        cleanup.callback(watch.stop)
        begin = msgspec.msgpack.decode(first, type=messages.ToWorker)
        if isinstance(begin, messages.RankRefused):
            raise ConfigError("rank", rank, begin.reason, "see the driver's output")

        def reply(message: messages.FromWorker) -> None:
            socket.send(msgspec.msgpack.encode(message))

        heartbeat = _open_heartbeat(context, address, rank, begin.config.liveness.heartbeat_interval)
        cleanup.callback(heartbeat.stop)
        try:
            use_interface(host)
            _serve(begin, rank, device, socket, Answers(context), reply)
        except BaseException as error:
            reply(messages.failure(rank, error))
            return False
        return True


def _open_heartbeat(context: zmq.Context[zmq.Socket[bytes]], address: str, rank: int, seconds: float) -> Heartbeat:
    """Open a second connection to the driver, on which a thread replies to `HEARTBEAT`.

    The first message is not requested: it shows the driver which connection belongs to this rank. Later ones are only
    sent on request, because an idle driver reads nothing and unread messages would fill its memory.
    """
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    alive = msgspec.msgpack.encode(messages.RankAlive(rank))
    socket.send(alive)

    def message() -> bytes | None:
        requested = False
        while socket.poll(0):
            requested = socket.recv() == messages.HEARTBEAT
        return alive if requested else None

    return Heartbeat(socket, message, seconds)


def _serve(
    begin: messages.Begin, rank: int, number: int, socket: zmq.Socket[bytes], answers: Answers, reply: Reply
) -> None:
    """Join the other ranks, load the weights, and carry out plans until `STOP`. `number` is the GPU's on this host."""
    if resolve_device(begin.config.device) == "cuda":
        # first of all: the first allocation, which `resolve` may make, would otherwise open a CUDA context on GPU 0
        torch.cuda.set_device(number)
    setup = resolve(begin.config)
    device = setup.device(number)
    torch.set_num_threads(setup.config.num_threads or share_of_cores(begin.ranks_on_host))
    join_world(rank, setup.grid.world_size, begin.rendezvous, device)
    traffic = Traffic(trace=Trace(setup.config.trace, device))

    def make_group(group: Sequence[int]) -> Collectives:
        return open_group(group, rank, traffic, device)

    store = TensorStore.of(setup, device)
    built = build_runner(setup, rank, store, build_vocabulary(setup), make_group)
    runner = built.runner
    traffic.reset()  # the calibration's traffic does not count
    gc.collect()
    gc.freeze()  # later collections do not walk the objects that exist now
    reply(messages.RankReady(rank, built.constants, built.memory))
    carry_out_plans(runner, rank, traffic, socket, answers)
    runner.close()


def carry_out_plans(runner: Runner, rank: int, traffic: Traffic, socket: zmq.Socket[bytes], answers: Answers) -> None:
    """Carry out plans from the driver's socket until `STOP`. Raises the first error of a step.

    Traffic and traces are reported at once, and may overtake the results of steps in flight: they hold what has been
    launched, and the driver tells messages apart by their kind.
    """

    def reply(message: messages.FromWorker) -> None:
        socket.send(msgspec.msgpack.encode(message))

    send = answers.put if runner.is_asynchronous else reply
    loop = StepLoop(runner, lambda result: send(messages.StepDone(result)), answers.fail)
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(answers.arriving, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        answers.forward(socket)
        if socket not in ready:
            continue
        message = socket.recv()
        if message == messages.STOP:
            break
        if message == messages.TRAFFIC:
            reply(messages.TrafficReport(traffic.bytes_by_label, traffic.calls_by_label))
        elif message == messages.TRACE:
            reply(messages.TraceReport(rank, traffic.trace.spans))
        elif message != messages.PROBE:
            loop.take(StepPlan.decode(message))
    loop.close()
