"""Ranks in other processes, on this host or others: torch.distributed between them, ZeroMQ to the driver.

It owns the messages, who of the ranks is there, and what is made of an end; starting and ending the processes is its
subclasses' part. It must not know what a plan says.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from threading import Thread
from typing import TypeVar

import msgspec
import zmq

from longspan.attention.calibrate import combine
from longspan.config import CostConstants
from longspan.engine.driver.executors.base import require_open
from longspan.engine.setup import EngineSetup
from longspan.engine.transport import messages
from longspan.engine.transport.connection import watch_peers
from longspan.engine.transport.heartbeat import Silence
from longspan.errors import ConfigError, WorkerDied
from longspan.parallel.collectives import Traffic
from longspan.parallel.grid import Grid
from longspan.parallel.trace import TraceSpan
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.version import __version__

_LOG = logging.getLogger("longspan.engine")
_POLL_MS = 200
_SAY_SECONDS = 5.0
_STOP_SECONDS = 5.0
_EXPLAIN_SECONDS = 0.5  # between a connection's end and the word of who started the process
M = TypeVar("M", messages.RankReady, messages.Stepped, messages.TrafficReport, messages.TraceReport)


class RemoteExecutor(ABC):
    """One process a rank. A rank that ends is noticed within a fraction of a second, one that is stopped or whose host
    vanishes after the seconds of the configuration's `liveness`.

    `listen` is where ranks report; those that have not within `patience` seconds are not waited for any longer.
    `setup` has the machines of the ranks as they turned out.
    """

    def __init__(self, setup: EngineSetup, listen: str, patience: float = float("inf")) -> None:
        self.setup = setup
        self.constants: CostConstants | None = None
        self._closed = False
        self._ranks: dict[bytes, int] = {}  # by the name of their connection
        self._heartbeats: dict[bytes, int] = {}  # ranks by the name of their heartbeat's connection
        self._silences: dict[int, Silence] = {}  # of ranks that are ready: C code may hold the interpreter before
        self._failed: dict[int, messages.RankFailed] = {}
        self._answers: list[deque[messages.FromWorker]] = [deque() for _ in range(setup.grid.world_size)]
        self._context = zmq.Context()
        self._line = self._context.socket(zmq.ROUTER)
        self._line.router_mandatory = True  # a message to a rank that is gone must not vanish in silence
        self._line.set_hwm(0)
        watch_peers(self._line, setup.config.liveness.heartbeat_timeout)
        try:
            self._bind(listen)
            self._launch(self._line.getsockopt_string(zmq.LAST_ENDPOINT))
            self._begin(self._gather(patience))
            measured = [ready.constants for ready in self._collect(messages.RankReady) if ready.constants]
            self.constants = combine(measured) if measured else None
        except BaseException:
            self._end(0.0)
            self.shutdown()
            raise

    @abstractmethod
    def _launch(self, address: str) -> None:
        """Start every rank; they are to report at the address."""

    @abstractmethod
    def _end_of(self, rank: int) -> str | None:
        """How a rank has ended, if it is known to have."""

    @abstractmethod
    def _end(self, seconds: float) -> None:
        """Give ranks that were told to stop so much time to end, then end them; safe to call again."""

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        self._broadcast(plan.encode())

    def collect(self, look: Callable[[], None]) -> StepResult:
        """See `Executor.collect`."""
        require_open(self._closed)
        return StepResult.joined([message.result for message in self._collect(messages.Stepped, look)])

    def check(self) -> None:
        """See `Executor.check`."""
        require_open(self._closed)
        while self._line.poll(0):
            self._receive()
        self._check_alive()

    def late(self) -> str | None:
        """See `Executor.late`."""
        rank, seconds = self._longest_silence()
        return _silent(rank, seconds) if seconds > self.setup.config.liveness.heartbeat_late else None

    def traffic(self) -> Traffic:
        """See `Executor.traffic`."""
        self._broadcast(messages.TRAFFIC)
        total = Traffic()
        for message in self._collect(messages.TrafficReport):
            total.add(Traffic(message.bytes_by_label, message.calls_by_label))
        return total

    def trace(self) -> dict[int, list[TraceSpan]]:
        """See `Executor.trace`."""
        self._broadcast(messages.TRACE)
        return {message.rank: message.spans for message in self._collect(messages.TraceReport)}

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        if self._closed:
            return
        self._closed = True
        for name in self._ranks:
            self._reaches(name, messages.STOP)
        self._end(_STOP_SECONDS)
        self._line.close(linger=0)
        # once seen to wait for ever, after a rank that was stopped: whoever shuts down must not
        ending = Thread(target=self._context.term, name="longspan-close", daemon=True)
        ending.start()
        ending.join(_STOP_SECONDS)

    def _bind(self, listen: str) -> None:
        try:
            self._line.bind(listen)
        except zmq.ZMQError as error:
            raise ConfigError(
                "listen", listen, f"cannot be listened at ({error})", "give an address of this host as tcp://host:port"
            ) from error

    def _gather(self, patience: float) -> list[messages.RankHello]:
        """Wait for every rank to report; of a rank that reports twice the later one counts."""
        found: dict[int, tuple[bytes, messages.RankHello]] = {}
        waiting = _Patience(patience, self.setup.grid.world_size, self._line.getsockopt_string(zmq.LAST_ENDPOINT))
        while len(found) < self.setup.grid.world_size:
            waiting.check(found)
            name, message = self._next()
            if message is None and (end := self._known_end()):
                raise WorkerDied(f"{end} before it had started")
            if not isinstance(message, messages.RankHello):
                continue
            if objection := self._objection(message):
                self._reaches(name, msgspec.msgpack.encode(messages.RankRefused(objection)))
            else:
                found[message.rank] = (name, message)
        self._ranks = {name: rank for rank, (name, _) in sorted(found.items())}
        return [found[rank][1] for rank in sorted(found)]

    def _objection(self, hello: messages.RankHello) -> str | None:
        size = self.setup.grid.world_size
        if hello.version != __version__:
            return f"it runs version {hello.version} and the driver {__version__}"
        if hello.world_size != size or hello.rank not in range(size):
            return f"the driver's layout has {size} ranks, and this is one of {hello.world_size}"
        return None

    def _begin(self, hellos: Sequence[messages.RankHello]) -> None:
        hosts = [hello.host for hello in hellos]
        self.setup = _placed(self.setup, hosts)
        config = replace(self.setup.config, device=self.setup.device_type)  # the same on every host
        meet_at = self._meeting_place(hellos)
        for name, rank in self._ranks.items():
            begin = messages.Begin(config, meet_at, hosts.count(hosts[rank]))
            if not self._reaches(name, msgspec.msgpack.encode(begin)):
                self._check_alive()

    def _meeting_place(self, hellos: Sequence[messages.RankHello]) -> str:
        """Where ranks of several machines meet: at the store of rank 0."""
        return f"tcp://{hellos[0].host}:{hellos[0].store_port}"

    def _broadcast(self, message: bytes) -> None:
        require_open(self._closed)
        for name in self._ranks:
            if not self._reaches(name, message):
                self._check_alive()

    def _reaches(self, name: bytes, message: bytes) -> bool:
        """Send to a rank; False if it is gone."""
        try:
            self._line.send_multipart([name, message])
        except zmq.ZMQError:
            return False
        return True

    def _collect(self, kind: type[M], look: Callable[[], None] = lambda: None) -> list[M]:
        """The oldest message of a kind from every rank; raises as soon as one failed or died, or `look` raises."""
        while True:
            oldest = [next((m for m in answers if isinstance(m, kind)), None) for answers in self._answers]
            if None not in oldest:
                break
            self._receive()
            try:
                look()
            except BaseException:
                self._abandon()
                raise
        found = [message for message in oldest if message is not None]
        for answers, message in zip(self._answers, found, strict=True):
            answers.remove(message)
        return found

    def _receive(self) -> None:
        name, message = self._next()
        if message is None:
            self._check_alive()
        elif isinstance(message, messages.Alive):
            self._heartbeats[name] = message.rank
            if message.rank in self._silences:
                self._silences[message.rank].heard()
        elif name not in self._ranks:  # a rank of an engine before this one, or one too many
            return
        elif isinstance(message, messages.RankFailed):
            self._fail(message)
        else:
            if isinstance(message, messages.RankReady):
                self._silences[message.rank] = Silence()
            self._answers[self._ranks[name]].append(message)

    def _next(self) -> tuple[bytes, messages.FromWorker | None]:
        """The next message and who sent it, or None if there is none for a while."""
        if not self._line.poll(_POLL_MS):
            return b"", None
        name, body = self._line.recv_multipart()
        try:
            return name, msgspec.msgpack.decode(body, type=messages.FromWorker)
        except msgspec.MsgspecError:  # no rank of ours: the port may be open to others
            return name, None

    def _check_alive(self) -> None:
        end = self._known_end()
        if end is None:
            lost = [rank for name, rank in self._ranks.items() if not self._reaches(name, messages.THERE)]
            silent = [rank for rank in lost if rank not in self._failed]
            if silent:
                end = self._explained() or f"rank {silent[0]} has ended, or its host cannot be reached"
            else:
                end = self._long_silent()
        if end is None:
            return
        self._abandon()
        raise WorkerDied(f"{end}; requests in flight are lost, start the engine again")

    def _long_silent(self) -> str | None:
        """Ask every rank's heartbeat; what is to be said of one that has not answered for too long."""
        for name in self._heartbeats:
            self._reaches(name, messages.ASK)
        for silence in self._silences.values():
            silence.look()
        rank, seconds = self._longest_silence()
        return _silent(rank, seconds) if seconds > self.setup.config.liveness.heartbeat_timeout else None

    def _longest_silence(self) -> tuple[int, float]:
        """The rank that has been silent for longest, and the seconds."""
        return max(
            ((rank, s.seconds) for rank, s in self._silences.items()), key=lambda pair: pair[1], default=(0, 0.0)
        )

    def _known_end(self) -> str | None:
        """The end of the first rank that has ended without telling why itself."""
        silent = [rank for rank in range(self.setup.grid.world_size) if rank not in self._failed]
        return next((f"rank {rank} {end}" for rank in silent if (end := self._end_of(rank))), None)

    def _explained(self) -> str | None:
        """A connection is lost: what whoever started the process says of it, which may take a moment."""
        deadline = time.monotonic() + _EXPLAIN_SECONDS
        while time.monotonic() < deadline:
            if end := self._known_end():
                return end
            time.sleep(0.02)
        return None

    def _fail(self, message: messages.RankFailed) -> None:
        """A rank reports an error. A lost peer is only the echo of another rank's end: look for that first."""
        self._failed[message.rank] = message
        deadline = time.monotonic() + _POLL_MS / 1000
        while all(failed.lost_peer for failed in self._failed.values()) and time.monotonic() < deadline:
            name, other = self._next()
            if isinstance(other, messages.RankFailed) and name in self._ranks:
                self._failed[other.rank] = other
        cause = next((failed for failed in self._failed.values() if not failed.lost_peer), None)
        if cause is None:
            self._check_alive()
        self._abandon()
        raise messages.report_error(cause or message)

    def _abandon(self) -> None:
        self._end(0.0)
        self.shutdown()


class _Patience:
    """How long ranks that have not reported are waited for, and what is said meanwhile."""

    def __init__(self, seconds: float, size: int, address: str) -> None:
        self._seconds, self._size, self._address = seconds, size, address
        self._started = time.monotonic()
        self._said = seconds == float("inf")  # ranks this host starts itself need no word

    def check(self, found: Collection[int]) -> None:
        """Raise `ConfigError` when it has taken too long."""
        waited = time.monotonic() - self._started
        missing = ", ".join(str(rank) for rank in range(self._size) if rank not in found)
        if not self._said and waited > _SAY_SECONDS:
            self._said = True
            _LOG.warning("waiting for rank %s of %d at %s", missing, self._size, self._address)
        if waited > self._seconds:
            raise ConfigError(
                "cluster_timeout", self._seconds,
                f"seconds have passed, and rank {missing} of {self._size} has not reported to {self._address}",
                "look at the output of that rank, and for a firewall between the hosts",
            )  # fmt: skip


def _silent(rank: int, seconds: float) -> str:
    return f"rank {rank} has not answered for {seconds:.1f} s: its process is stopped or hangs"


def _placed(setup: EngineSetup, hosts: Sequence[str]) -> EngineSetup:
    """With the machine of every rank, unless the user has named them."""
    parallel = setup.config.parallel
    if parallel.ranks_per_node or len(set(hosts)) == 1:
        return setup
    number = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    parallel = replace(parallel, node_of_rank=tuple(number[host] for host in hosts))
    return replace(setup, config=replace(setup.config, parallel=parallel), grid=Grid(parallel))
