"""One rank's side of the talk with its driver: it reports there, starts from the driver's word, and serves it.

It owns the order of a rank's life; it must not know who started the process, nor what a plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec
import torch
import zmq

from longspan.config import LivenessConfig
from longspan.engine.rank.build import build_runner, build_vocabulary, share_of_cores
from longspan.engine.rank.loading import TensorStore
from longspan.engine.rank.steps import StepLoop
from longspan.engine.setup import resolve, resolve_device
from longspan.engine.transport import messages
from longspan.engine.transport.connection import meet_driver, open_store, own_address, use_interface, watch_peers
from longspan.engine.transport.heartbeat import Heartbeat
from longspan.errors import ConfigError
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.trace import Trace
from longspan.parallel.world import join_world, leave_world, open_group
from longspan.plan.plan import StepPlan
from longspan.version import __version__

Answer = Callable[[messages.FromWorker], None]
_WORDS = (messages.THERE, messages.TRAFFIC, messages.TRACE)


def serve_driver(address: str, rank: int, world_size: int, device: int = 0) -> bool:
    """Serve the driver at an address until it says stop (True), or this rank has failed and told it so (False).

    `device` is the number of this rank's GPU on its host. The process ends at once if the driver goes. Raises
    `ConfigError` if nobody answers at the address, or the driver has no place for this rank.
    """
    with ExitStack() as leaving:
        leaving.callback(leave_world)
        context = zmq.Context()
        leaving.callback(context.destroy, linger=1000)
        line = context.socket(zmq.DEALER)
        line.set_hwm(0)  # a full inbox would not let ZeroMQ's heartbeats through: a long step would be taken for an end
        watch_peers(line, LivenessConfig.heartbeat_timeout)
        host = own_address(address)
        store = open_store(host) if rank == 0 and host else None  # ranks of one machine meet through a file
        hello = messages.RankHello(rank, world_size, __version__, host, store.port if store else 0)
        word, watch = meet_driver(line, address, msgspec.msgpack.encode(hello))
        leaving.callback(watch.stop)
        begin = msgspec.msgpack.decode(word, type=messages.ToWorker)
        if isinstance(begin, messages.RankRefused):
            raise ConfigError("rank", rank, begin.reason, "see the driver's output")

        def answer(message: messages.FromWorker) -> None:
            line.send(msgspec.msgpack.encode(message))

        heartbeat = _open_heartbeat(context, address, rank, begin.config.liveness.heartbeat_interval)
        leaving.callback(heartbeat.stop)
        try:
            use_interface(host)
            _serve(begin, rank, device, line, answer)
        except BaseException as error:
            answer(messages.failure(rank, error))
            return False
        return True


def _open_heartbeat(context: zmq.Context[zmq.Socket[bytes]], address: str, rank: int, seconds: float) -> Heartbeat:
    """Introduce a second connection to the driver, on which a thread answers whenever it is asked.

    It answers only then: words that nobody reads would fill the memory of a driver that has nothing to do.
    """
    line = context.socket(zmq.DEALER)
    line.connect(address)
    word = msgspec.msgpack.encode(messages.Alive(rank))
    line.send(word)

    def answer() -> bytes | None:
        asked = False
        while line.poll(0):
            asked = line.recv() == messages.ASK
        return word if asked else None

    return Heartbeat(line, answer, seconds)


def _serve(begin: messages.Begin, rank: int, number: int, line: zmq.Socket[bytes], answer: Answer) -> None:
    if resolve_device(begin.config.device) == "cuda":
        torch.cuda.set_device(number)  # first: what allocates later, as `resolve` does, would open a context on GPU 0
    setup = resolve(begin.config)
    device = setup.device(number)
    torch.set_num_threads(setup.config.num_threads or share_of_cores(begin.ranks_here))
    join_world(rank, setup.grid.world_size, begin.meet_at, device)
    traffic = Traffic(trace=Trace(setup.config.trace))

    def make_group(group: Sequence[int]) -> Collectives:
        return open_group(group, rank, traffic, device)

    store = TensorStore(setup.source.checkpoint, setup.dtype, device, setup.scaled.weights)
    runner, constants = build_runner(setup, rank, store, build_vocabulary(setup), make_group)
    traffic.reset()  # what was measured with is not the engine's
    answer(messages.RankReady(rank, constants))
    loop = StepLoop(runner, lambda result: answer(messages.Stepped(result)), lambda: bool(line.poll(0)))
    while (message := line.recv()) != messages.STOP:
        if message not in _WORDS:
            loop.take(StepPlan.decode(message))
            continue
        loop.flush()  # it may have waited for what is only a word
        if message == messages.TRAFFIC:
            answer(messages.TrafficReport(traffic.bytes_by_label, traffic.calls_by_label))
        elif message == messages.TRACE:
            answer(messages.TraceReport(rank, traffic.trace.spans))
    runner.close()
