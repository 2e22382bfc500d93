"""Ranks that the user starts, on any hosts: the driver waits for them and cannot end them but by leaving.

It owns nothing beyond that; see `external_worker.py` for the ranks.
"""

from __future__ import annotations

import time

from longspan.engine.driver.executors.remote import RemoteExecutor
from longspan.engine.setup import EngineSetup
from longspan.engine.transport.messages import THERE

_LOOK_SECONDS = 0.05


class ExternalExecutor(RemoteExecutor):
    """Ranks that the user has started. The driver cannot end them; a rank ends by itself when it loses the driver."""

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup, setup.config.cluster.listen, setup.config.cluster.timeout)

    def _launch(self, address: str) -> None:
        pass

    def _end_of(self, rank: int) -> str | None:
        return None

    def _end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(self._reaches(name, THERE) for name in self._ranks):
            time.sleep(_LOOK_SECONDS)
