"""Ranks as processes of this machine: torch.distributed between them, ZeroMQ to the driver.

It owns the processes, their start, their messages and their death; it must not know what a plan says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from longspan.attention.calibrate import combine
from longspan.attention.cost import CostConstants
from longspan.engine.executors.base import require_open
from longspan.engine.executors.messages import (
    Failed,
    FromWorker,
    Ready,
    Stepped,
    TraceReport,
    TrafficReport,
    report_error,
)
from longspan.engine.setup import EngineSetup
from longspan.errors import WorkerDied
from longspan.parallel.collectives import Traffic
from longspan.parallel.trace import TraceSpan
from longspan.plan import StepPlan
from longspan.request import SampledToken

_POLL_MS = 200
_STDERR = 2  # the descriptor: sys.stderr may be anything
_STOP_SECONDS = 5.0
M = TypeVar("M", Ready, Stepped, TrafficReport, TraceReport)


class ProcessExecutor:
    """One process a rank. A process that dies is noticed within a fraction of a second."""

    def __init__(self, setup: EngineSetup) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longspan-")
        self._context = zmq.Context()
        self._closed = False
        self.constants: CostConstants | None = None
        folder = Path(self._folder.name)
        self._results = self._context.socket(zmq.PULL)
        self._results.bind(f"ipc://{folder}/results")
        self._inboxes = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: list[deque[FromWorker]] = [deque() for _ in range(setup.grid.world_size)]
        (folder / "config").write_bytes(msgspec.json.encode(setup.config))
        try:
            for rank in range(setup.grid.world_size):
                inbox = self._context.socket(zmq.PUSH)
                inbox.bind(f"ipc://{folder}/rank-{rank}")
                self._inboxes.append(inbox)
                command = [
                    sys.executable,
                    "-m",
                    "longspan.engine.executors.process_worker",
                    str(folder),
                    str(rank),
                    str(os.getpid()),
                ]
                self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR))
            measured = [ready.constants for ready in self._collect(Ready) if ready.constants]
            self.constants = combine(measured) if measured else None
        except BaseException:
            self.shutdown()
            raise

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids, in rank order."""
        return [process.pid for process in self._processes]

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        self._broadcast(plan.encode())

    def collect(self) -> list[SampledToken]:
        """See `Executor.collect`."""
        require_open(self._closed)
        return [token for message in self._collect(Stepped) for token in message.tokens]

    def check(self) -> None:
        """See `Executor.check`."""
        require_open(self._closed)
        self._check_alive()

    def traffic(self) -> Traffic:
        """See `Executor.traffic`."""
        self._broadcast(b"traffic")
        total = Traffic()
        for message in self._collect(TrafficReport):
            total.add(Traffic(message.bytes_by_label, message.calls_by_label))
        return total

    def trace(self) -> dict[int, list[TraceSpan]]:
        """See `Executor.trace`."""
        self._broadcast(b"trace")
        return {message.rank: message.spans for message in self._collect(TraceReport)}

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        for inbox, process in zip(self._inboxes, self._processes, strict=False):
            if process.poll() is None:
                try:
                    inbox.send(b"stop", zmq.DONTWAIT)
                except zmq.ZMQError:  # it has not connected yet, or no longer is
                    process.kill()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._closed = True
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _broadcast(self, message: bytes) -> None:
        require_open(self._closed)
        for inbox in self._inboxes:
            while not inbox.poll(_POLL_MS, zmq.POLLOUT):  # a send to a peer that is gone would block for ever
                self._check_alive()
            inbox.send(message)

    def _collect(self, kind: type[M]) -> list[M]:
        """The oldest message of a kind from every rank; raises as soon as one failed or died."""
        while True:
            oldest = [next((m for m in answers if isinstance(m, kind)), None) for answers in self._answers]
            if None not in oldest:
                break
            self._receive()
        found = [message for message in oldest if message is not None]
        for answers, message in zip(self._answers, found, strict=True):
            answers.remove(message)
        return found

    def _receive(self) -> None:
        if not self._results.poll(_POLL_MS):
            self._check_alive()
            return
        message = msgspec.msgpack.decode(self._results.recv(), type=FromWorker)
        if isinstance(message, Failed):
            self._fail(message)
        self._answers[message.rank].append(message)

    def _check_alive(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                self._kill()
                raise WorkerDied(
                    f"rank {rank} (process {process.pid}) ended with exit code {process.returncode}; "
                    "requests in flight are lost, start the engine again"
                )

    def _fail(self, message: Failed) -> None:
        """A rank reports an error. A lost peer is only the echo of another rank's end: look for that first."""
        if message.lost_peer:
            time.sleep(_POLL_MS / 1000)
            self._check_alive()
        self._kill()
        raise report_error(message)

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        self.shutdown()
