"""Ranks as processes on this host, which the driver starts and ends.

It owns the processes; `remote.py` has the messages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from longspan.engine.driver.executors.remote import RemoteExecutor
from longspan.engine.setup import EngineSetup
from longspan.engine.transport.messages import RankHello
from longspan.private_folder import PrivateFolder

_STDERR = 2  # the file descriptor, because sys.stderr may be replaced by an object without one


class ProcessExecutor(RemoteExecutor):
    """See `RemoteExecutor`. Ranks end with the driver, however it ends."""

    def __init__(self, setup: EngineSetup) -> None:
        self._folder = PrivateFolder()
        self._processes: list[subprocess.Popen[bytes]] = []
        super().__init__(setup, f"ipc://{self._folder.name}/driver")

    @property
    def process_ids(self) -> list[int]:
        """The process ids, in rank order."""
        return [process.pid for process in self._processes]

    def _launch(self, address: str) -> None:
        program = [sys.executable, "-m", "longspan.engine.rank.process_rank"]
        size = self.setup.grid.world_size
        for rank in range(size):
            command = [*program, address, str(rank), str(size), str(os.getpid())]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR))

    def _rendezvous(self, hellos: Sequence[RankHello]) -> str:
        # a file: anyone who reached the port of a store could read and change what ranks write there
        return f"{self._folder.name}/store"

    def _exit_of(self, rank: int) -> str | None:
        process = self._processes[rank]
        return None if process.poll() is None else f"(process {process.pid}) ended with exit code {process.returncode}"

    def _end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()
