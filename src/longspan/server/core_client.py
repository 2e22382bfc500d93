"""The core's process as the server sees it: started, spoken to, noticed when it ends or hangs.

It owns the process and the sockets of one life of the core; it must not decide what happens after its death.
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
from longspan.engine.transport.heartbeat import Silence
from longspan.errors import EngineError, StepTimeout, WorkerDied, error_named
from longspan.private_folder import PrivateFolder
from longspan.server.messages import Beat, Failed, FromCore, Ready, Stop, ToCore

_POLL_MS = 200
_STDERR = 2
_STOP_SECONDS = 5.0


class CoreProcess:
    """One life of the core, from start to `close`."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = PrivateFolder()
        folder = Path(self._folder.name)
        (folder / "config").write_bytes(msgspec.json.encode(config))
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{folder}/from-core")
        self._outbox: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUSH)
        self._outbox.set_hwm(0)  # what waits here are requests: bounded where they come in
        self._outbox.bind(f"ipc://{folder}/to-core")
        command = [sys.executable, "-m", "longspan.server.core_process", str(folder), str(os.getpid())]
        below = {**os.environ, "TMPDIR": str(folder)}  # what it makes goes with the folder, however it ends
        # a group of its own, with its ranks: a rank that is stopped cannot see that the core has ended
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, env=below, process_group=0)
        self.worker_ids: list[int] = []
        self._config = config
        self._pace: float | None = None
        self._silence = Silence()
        self._longest_silence = config.liveness.start_timeout  # until it is ready
        self._late: str | None = None

    @property
    def process_id(self) -> int:
        """Of the core itself; its ranks may have their own, which are in `worker_ids`."""
        return self._process.pid

    @property
    def trouble(self) -> str | None:
        """Why it may not go on, if there is a sign of that: it, or one of its ranks, has said nothing for seconds."""
        silent = self._silence.seconds > self._config.liveness.heartbeat_late
        return self._silent() if silent else self._late

    def config_after(self, error: Exception) -> EngineConfig:
        """The configuration of the core that follows when this one has ended with an error.

        After one whose step hung it has that one's pace, and so no warm-up: a request that hangs every core by its
        first step is seen to each time.
        """
        pace = self._pace if isinstance(error, StepTimeout) else None
        return replace(self._config, liveness=replace(self._config.liveness, pace=pace))

    def send(self, message: ToCore) -> None:
        """Hand a message over; it is lost if the core has ended, which `receive` will say."""
        with suppress(zmq.Again):
            self._outbox.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)

    async def receive(self) -> FromCore:
        """The next message. Raises the error the core reports, or `WorkerDied` if it ends or hangs without a word."""
        while True:
            message = await self._next()
            match message:
                case Failed(kind, told):
                    raise error_named(kind, told) or EngineError(f"{kind}: {told}")
                case Beat(late, pace):
                    self._late, self._pace = late, pace
                    continue
                case Ready():
                    self._longest_silence = self._config.liveness.heartbeat_timeout
            return message

    async def _next(self) -> FromCore:
        while not await self._inbox.poll(_POLL_MS):
            if self._process.poll() is not None and not await self._inbox.poll(0):
                raise WorkerDied(f"the engine's process {self._process.pid} ended with code {self._process.returncode}")
            if self._silence.look() > self._longest_silence:
                raise WorkerDied(self._silent())
        self._silence.heard()
        message: FromCore = msgspec.msgpack.decode(await self._inbox.recv(), type=FromCore)
        return message

    def _silent(self) -> str:
        seconds = self._silence.seconds
        return f"the engine's process {self._process.pid} has been silent for {seconds:.1f} s: it is stopped or hangs"

    async def close(self) -> None:
        """End the process, politely first; safe to call again."""
        if self._process.poll() is None:
            self.send(Stop())
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the process and its ranks at once and clean up."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._outbox.close(linger=0)
        self._context.destroy(linger=0)
        self._folder.cleanup()
