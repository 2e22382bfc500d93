"""Ranks in other processes, on this host or others: torch.distributed between them, ZeroMQ to the driver.

It owns the messages to and from ranks, and the detection of ranks that have ended or hang. Subclasses start and end the
processes. It must not know what a plan contains.
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
from longspan.engine.transport.connection import detect_lost_peers
from longspan.engine.transport.heartbeat import SilenceTimer
from longspan.errors import ConfigError, WorkerDied
from longspan.parallel.collectives import Traffic
from longspan.parallel.grid import Grid
from longspan.parallel.trace import TraceSpan
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.version import __version__

_LOG = logging.getLogger("longspan.engine")
_POLL_MS = 200
_WARN_SECONDS = 5.0
_STOP_SECONDS = 5.0
_EXIT_SECONDS = 0.5  # from the loss of a rank's connection until its exit code is known
M = TypeVar("M", messages.RankReady, messages.StepDone, messages.TrafficReport, messages.TraceReport)


class RemoteExecutor(ABC):
    """See `Executor`. Every rank is a process.

    The end of a rank's process is detected within a fraction of a second, by its closed connection. A process that is
    stopped and a host that vanishes are detected by the heartbeats that `liveness` configures.

    Ranks connect to the address `listen`. If some have not done so after `timeout` seconds, `ConfigError` is raised.
    Then `setup` has the host of every rank.
    """

    def __init__(self, setup: EngineSetup, listen: str, timeout: float = float("inf")) -> None:
        self.setup = setup
        self.constants: CostConstants | None = None
        self._closed = False
        self._ranks: dict[bytes, int] = {}  # by ZeroMQ's name for their connection
        self._heartbeats: dict[bytes, int] = {}  # ranks by the name of their heartbeat's connection
        # of ranks that are ready: while a rank loads, C code may hold the interpreter lock and delay its heartbeat
        self._silences: dict[int, SilenceTimer] = {}
        self._failed: dict[int, messages.RankFailed] = {}
        # messages of each rank that `_collect` has not returned yet
        self._replies: list[deque[messages.FromWorker]] = [deque() for _ in range(setup.grid.world_size)]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True  # sending to a rank that has disconnected is an error
        self._socket.set_hwm(0)
        detect_lost_peers(self._socket, setup.config.liveness.heartbeat_timeout)
        try:
            self._bind(listen)
            self._launch(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
            self._begin(self._wait_for_ranks(timeout))
            ready = self._collect(messages.RankReady)
            measured = [rank.constants for rank in ready if rank.constants]
            self.setup = self.setup.with_memory(ready[0].memory)
            self.constants = combine(measured) if measured else None
        except BaseException:
            self._kill()
            raise

    @abstractmethod
    def _launch(self, address: str) -> None:
        """Start every rank. It connects to the driver at this address."""

    @abstractmethod
    def _exit_of(self, rank: int) -> str | None:
        """How a rank's process has ended; None if it has not, or if that cannot be known."""

    @abstractmethod
    def _end(self, seconds: float) -> None:
        """Wait up to `seconds` for the ranks to end, then kill them. May be called again."""

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        self._broadcast(plan.encode())

    def collect(self, while_waiting: Callable[[], None]) -> StepResult:
        """See `Executor.collect`."""
        require_open(self._closed)
        return StepResult.joined([message.result for message in self._collect(messages.StepDone, while_waiting)])

    def check(self) -> None:
        """See `Executor.check`."""
        require_open(self._closed)
        while self._socket.poll(0):
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
            self._send_to(name, messages.STOP)
        self._end(_STOP_SECONDS)
        self._socket.close(linger=0)
        # in a daemon thread with a time limit: `term` has been seen to block for ever after a rank was stopped
        ending = Thread(target=self._context.term, name="longspan-close", daemon=True)
        ending.start()
        ending.join(_STOP_SECONDS)

    def _bind(self, listen: str) -> None:
        try:
            self._socket.bind(listen)
        except zmq.ZMQError as error:
            raise ConfigError(
                "listen", listen, f"cannot be listened at ({error})", "give an address of this host as tcp://host:port"
            ) from error

    def _wait_for_ranks(self, timeout: float) -> list[messages.RankHello]:
        """Wait until every rank has sent its `RankHello`; of a rank that sends two, the later one counts."""
        found: dict[int, tuple[bytes, messages.RankHello]] = {}
        size, address = self.setup.grid.world_size, self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        limit = _StartLimit(timeout, size, address)
        while len(found) < size:
            limit.check(found)
            name, message = self._next()
            if message is None and (exit_of := self._first_exit()):
                raise WorkerDied(f"{exit_of} before it had started")
            if not isinstance(message, messages.RankHello):
                continue
            if mismatch := self._mismatch(message):
                self._send_to(name, msgspec.msgpack.encode(messages.RankRefused(mismatch)))
            else:
                found[message.rank] = (name, message)
        self._ranks = {name: rank for rank, (name, _) in sorted(found.items())}
        return [found[rank][1] for rank in sorted(found)]

    def _mismatch(self, hello: messages.RankHello) -> str | None:
        """Why a rank cannot be one of this engine's; None if it can."""
        size = self.setup.grid.world_size
        if hello.version != __version__:
            return f"it runs version {hello.version} and the driver {__version__}"
        if hello.world_size != size or hello.rank not in range(size):
            return f"the driver's layout has {size} ranks, and this is one of {hello.world_size}"
        return None

    def _begin(self, hellos: Sequence[messages.RankHello]) -> None:
        """Send every rank the configuration, and where the ranks find each other."""
        hosts = [hello.host for hello in hellos]
        self.setup = _with_hosts(self.setup, hosts)
        config = replace(self.setup.config, device=self.setup.device_type)  # the same on every host
        rendezvous = self._rendezvous(hellos)
        for name, rank in self._ranks.items():
            begin = messages.Begin(config, rendezvous, hosts.count(hosts[rank]))
            if not self._send_to(name, msgspec.msgpack.encode(begin)):
                self._check_alive()

    def _rendezvous(self, hellos: Sequence[messages.RankHello]) -> str:
        """See `messages.Begin.rendezvous`: the store of rank 0, unless a subclass keeps all ranks on one host."""
        return f"tcp://{hellos[0].host}:{hellos[0].store_port}"

    def _broadcast(self, message: bytes) -> None:
        require_open(self._closed)
        for name in self._ranks:
            if not self._send_to(name, message):
                self._check_alive()

    def _send_to(self, name: bytes, message: bytes) -> bool:
        """Send a message on a connection; False if it is lost."""
        try:
            self._socket.send_multipart([name, message])
        except zmq.ZMQError:
            return False
        return True

    def _collect(self, kind: type[M], while_waiting: Callable[[], None] = lambda: None) -> list[M]:
        """Wait for one message of a kind from every rank; returns the oldest of each, in rank order.

        Raises as soon as a rank has failed or ended, or `while_waiting` raises.
        """
        while True:
            oldest = [next((m for m in replies if isinstance(m, kind)), None) for replies in self._replies]
            if None not in oldest:
                break
            self._receive()
            try:
                while_waiting()
            except BaseException:
                self._kill()
                raise
        found = [message for message in oldest if message is not None]
        for replies, message in zip(self._replies, found, strict=True):
            replies.remove(message)
        return found

    def _receive(self) -> None:
        """Take the next message. If there is none for a while, check that all ranks are alive."""
        name, message = self._next()
        if message is None:
            self._check_alive()
        elif isinstance(message, messages.RankAlive):
            self._heartbeats[name] = message.rank
            if message.rank in self._silences:
                self._silences[message.rank].reset()
        elif name not in self._ranks:  # a rank of an earlier engine, or one that was refused
            return
        elif isinstance(message, messages.RankFailed):
            self._raise_failure(message)
        else:
            if isinstance(message, messages.RankReady):
                self._silences[message.rank] = SilenceTimer()
            self._replies[self._ranks[name]].append(message)

    def _next(self) -> tuple[bytes, messages.FromWorker | None]:
        """The next message and the name of its connection; None if none arrives for 0.2 s, or if it is invalid."""
        if not self._socket.poll(_POLL_MS):
            return b"", None
        name, body = self._socket.recv_multipart()
        try:
            return name, msgspec.msgpack.decode(body, type=messages.FromWorker)
        except msgspec.MsgspecError:  # not from a rank: other programs may reach the port
            return name, None

    def _check_alive(self) -> None:
        """Raise `WorkerDied`, and end all ranks, if one has ended or does not answer."""
        problem = self._first_exit()
        if problem is None:
            lost = [rank for name, rank in self._ranks.items() if not self._send_to(name, messages.PROBE)]
            unexplained = [rank for rank in lost if rank not in self._failed]
            if unexplained:
                problem = self._wait_for_exit()
                problem = problem or f"rank {unexplained[0]} has ended, or its host cannot be reached"
            else:
                problem = self._heartbeat_timeout()
        if problem is None:
            return
        self._kill()
        raise WorkerDied(f"{problem}; requests in flight are lost, start the engine again")

    def _heartbeat_timeout(self) -> str | None:
        """Request a heartbeat from every rank. Returns which rank has not replied for too long, or None."""
        for name in self._heartbeats:
            self._send_to(name, messages.HEARTBEAT)
        for silence in self._silences.values():
            silence.update()
        rank, seconds = self._longest_silence()
        return _silent(rank, seconds) if seconds > self.setup.config.liveness.heartbeat_timeout else None

    def _longest_silence(self) -> tuple[int, float]:
        """The rank that has been silent for longest, and the seconds."""
        return max(
            ((rank, s.seconds) for rank, s in self._silences.items()), key=lambda pair: pair[1], default=(0, 0.0)
        )

    def _first_exit(self) -> str | None:
        """How the first rank has ended of those whose process has ended without a `RankFailed`; None without one."""
        ranks = [rank for rank in range(self.setup.grid.world_size) if rank not in self._failed]
        return next((f"rank {rank} {exit_of}" for rank in ranks if (exit_of := self._exit_of(rank))), None)

    def _wait_for_exit(self) -> str | None:
        """`_first_exit` after a connection was lost, which may be known before the process has ended."""
        deadline = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < deadline:
            if exit_of := self._first_exit():
                return exit_of
            time.sleep(0.02)
        return None

    def _raise_failure(self, message: messages.RankFailed) -> None:
        """End all ranks and raise the error that a rank has reported.

        If the rank failed because it lost another one, wait a moment for that rank's own report and raise that.
        """
        self._failed[message.rank] = message
        deadline = time.monotonic() + _POLL_MS / 1000
        while all(failed.lost_peer for failed in self._failed.values()) and time.monotonic() < deadline:
            name, other = self._next()
            if isinstance(other, messages.RankFailed) and name in self._ranks:
                self._failed[other.rank] = other
        cause = next((failed for failed in self._failed.values() if not failed.lost_peer), None)
        if cause is None:
            self._check_alive()
        self._kill()
        raise messages.report_error(cause or message)

    def _kill(self) -> None:
        """End all ranks without waiting for them, and close the executor."""
        self._end(0.0)
        self.shutdown()


class _StartLimit:
    """The time limit for ranks to connect, with a warning on the way."""

    def __init__(self, seconds: float, size: int, address: str) -> None:
        self._seconds, self._size, self._address = seconds, size, address
        self._started = time.monotonic()
        self._warned = seconds == float("inf")  # no warning for ranks that the driver starts itself

    def check(self, found: Collection[int]) -> None:
        """Raise `ConfigError` after the time limit. `found` are the ranks that have connected."""
        waited = time.monotonic() - self._started
        missing = ", ".join(str(rank) for rank in range(self._size) if rank not in found)
        if not self._warned and waited > _WARN_SECONDS:
            self._warned = True
            _LOG.warning("waiting for rank %s of %d at %s", missing, self._size, self._address)
        if waited > self._seconds:
            raise ConfigError(
                "cluster_timeout", self._seconds,
                f"seconds have passed, and rank {missing} of {self._size} has not reported to {self._address}",
                "look at the output of that rank, and for a firewall between the hosts",
            )  # fmt: skip


def _silent(rank: int, seconds: float) -> str:
    return f"rank {rank} has not answered for {seconds:.1f} s: its process is stopped or hangs"


def _with_hosts(setup: EngineSetup, hosts: Sequence[str]) -> EngineSetup:
    """The setup with the number of every rank's host, from their addresses; unchanged if the user has set it."""
    parallel = setup.config.parallel
    if parallel.ranks_per_node or len(set(hosts)) == 1:
        return setup
    number = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    parallel = replace(parallel, node_of_rank=tuple(number[host] for host in hosts))
    return replace(setup, config=replace(setup.config, parallel=parallel), grid=Grid(parallel))
