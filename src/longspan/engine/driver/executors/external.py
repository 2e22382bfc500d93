"""Ranks that the user starts, on any hosts, for example with torchrun. `external_rank.py` is their program.

It owns only how the driver waits for their end, because it neither starts nor kills them.
"""

from __future__ import annotations

import time

from longspan.engine.driver.executors.remote import RemoteExecutor
from longspan.engine.setup import EngineSetup
from longspan.engine.transport.messages import PROBE

_CHECK_SECONDS = 0.05


class ExternalExecutor(RemoteExecutor):
    """See `RemoteExecutor`. The driver cannot kill these ranks; a rank ends itself when it loses its connection."""

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup, setup.config.cluster.listen, setup.config.cluster.timeout)

    def _launch(self, address: str) -> None:
        pass

    def _exit_of(self, rank: int) -> str | None:
        return None

    def _end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(self._send_to(name, PROBE) for name in self._ranks):
            time.sleep(_CHECK_SECONDS)
