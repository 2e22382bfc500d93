"""The server's handle on the core's process: starts it, exchanges messages, notices when it ends or hangs.

It owns the process and the sockets of one epoch of the core; it must not decide what happens after a failure.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from longspan.config import EngineConfig
from longspan.engine.transport.heartbeat import SilenceTimer
from longspan.errors import EngineError, StepTimeout, WorkerDied, error_named
from longspan.private_folder import PrivateFolder
from longspan.server.messages import Beat, CoreFailed, CoreReady, FromCore, Stop, ToCore

_POLL_MS = 200
_STDERR = 2
_STOP_SECONDS = 5.0


class CoreProcess:
    """One process of the core, from its start to `close` or `kill`."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = PrivateFolder()
        folder = Path(self._folder.name)
        (folder / "config").write_bytes(msgspec.json.encode(config))
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{folder}/from-core")
        self._outbox: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUSH)
        self._outbox.set_hwm(0)  # unlimited: the server bounds the number of requests
        self._outbox.bind(f"ipc://{folder}/to-core")
        command = [sys.executable, "-m", "longspan.server.core_process", str(folder), str(os.getpid())]
        below = {**os.environ, "TMPDIR": str(folder)}  # its temporary files are removed with the folder
        # the core and its ranks form a process group, which `kill` ends: a stopped rank cannot end itself
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, env=below, process_group=0)
        self.worker_ids: list[int] = []
        self._config = config
        self._pace: float | None = None
        self._silence = SilenceTimer()
        self._longest_silence = config.liveness.start_timeout  # of a core that is starting; shorter once it is ready
        self._late: str | None = None

    @property
    def process_id(self) -> int:
        """The core's process id. Those of its ranks, if they are processes, are in `worker_ids`."""
        return self._process.pid

    @property
    def trouble(self) -> str | None:
        """A reason to expect a failure: the core or a rank has been silent for some seconds. None without one."""
        silent = self._silence.seconds > self._config.liveness.heartbeat_late
        return self._silent() if silent else self._late

    def config_after(self, error: Exception) -> EngineConfig:
        """The configuration for the next core, after this one has failed with `error`.

        After a `StepTimeout` the next core gets the seconds per token that this one measured, so that its steps have a
        limit from the first on. Otherwise a request whose first step hangs would hang every new core during warm-up.
        """
        pace = self._pace if isinstance(error, StepTimeout) else None
        return replace(self._config, liveness=replace(self._config.liveness, pace=pace))

    def send(self, message: ToCore) -> None:
        """Send a message. It is lost if the core has ended, which `receive` then raises."""
        with suppress(zmq.Again):
            self._outbox.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)

    async def receive(self) -> FromCore:
        """The next message. Raises the error that the core reports, or `WorkerDied` if it ends or hangs without one."""
        while True:
            message = await self._next()
            match message:
                case CoreFailed(kind, told):
                    raise error_named(kind, told) or EngineError(f"{kind}: {told}")
                case Beat(late, pace):
                    self._late, self._pace = late, pace
                    continue
                case CoreReady():
                    self._longest_silence = self._config.liveness.heartbeat_timeout
            return message

    async def _next(self) -> FromCore:
        while not await self._inbox.poll(_POLL_MS):
            if self._process.poll() is not None and not await self._inbox.poll(0):
                raise WorkerDied(f"the engine's process {self._process.pid} ended with code {self._process.returncode}")
            if self._silence.update() > self._longest_silence:
                raise WorkerDied(self._silent())
        self._silence.reset()
        message: FromCore = msgspec.msgpack.decode(await self._inbox.recv(), type=FromCore)
        return message

    def _silent(self) -> str:
        seconds = self._silence.seconds
        return f"the engine's process {self._process.pid} has been silent for {seconds:.1f} s: it is stopped or hangs"

    async def close(self) -> None:
        """Ask the process to stop, and kill it if it does not. May be called more than once."""
        if self._process.poll() is None:
            self.send(Stop())
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the process and its ranks, and free sockets and files."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._outbox.close(linger=0)
        self._context.destroy(linger=0)
        self._folder.cleanup()
