"""The core's process as the server sees it: started, spoken to, noticed when it ends.

It owns the process and the sockets of one life of the core; it must not decide what happens after its death.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from longspan import errors
from longspan.config import EngineConfig
from longspan.errors import EngineError, LongspanError, WorkerDied
from longspan.server.messages import Failed, FromCore, Stop, ToCore

_POLL_MS = 200
_STDERR = 2
_STOP_SECONDS = 5.0


class CoreProcess:
    """One life of the core, from start to `close`."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longspan-core-")
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
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, env=below)
        self.worker_ids: list[int] = []

    @property
    def process_id(self) -> int:
        """Of the core itself; its ranks may have their own, which are in `worker_ids`."""
        return self._process.pid

    def send(self, message: ToCore) -> None:
        """Hand a message over; it is lost if the core has ended, which `receive` will say."""
        with suppress(zmq.Again):
            self._outbox.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)

    async def receive(self) -> FromCore:
        """The next message. Raises the error the core reports, or `WorkerDied` if it ends without a word."""
        while not await self._inbox.poll(_POLL_MS):
            if self._process.poll() is not None and not await self._inbox.poll(0):
                raise WorkerDied(f"the engine's process {self._process.pid} ended with code {self._process.returncode}")
        message: FromCore = msgspec.msgpack.decode(await self._inbox.recv(), type=FromCore)
        if isinstance(message, Failed):
            raise _error(message)
        return message

    async def close(self) -> None:
        """End the process, politely first; safe to call again."""
        if self._process.poll() is None:
            self.send(Stop())
            try:
                await asyncio.to_thread(self._process.wait, _STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.kill()

    def kill(self) -> None:
        """End the process at once and clean up."""
        self._process.kill()
        self._process.wait()
        self._outbox.close(linger=0)
        self._context.destroy(linger=0)
        self._folder.cleanup()


def _error(message: Failed) -> LongspanError:
    """Of the same class where it is one of ours with a plain message."""
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, (errors.ModelError, EngineError)):
        return kind(message.message)
    return EngineError(f"{message.kind}: {message.message}")
