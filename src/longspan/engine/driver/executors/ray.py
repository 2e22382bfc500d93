"""Ranks as Ray actors: Ray chooses the hosts, starts the processes and reports their end.

It owns the actors; messages and collectives are those of all remote ranks.
"""

from __future__ import annotations

from typing import Any

from longspan.engine.driver.executors.ray_cluster import Cluster, Placement, import_ray
from longspan.engine.driver.executors.remote import RemoteExecutor
from longspan.engine.rank.ray_rank import RankActor
from longspan.engine.setup import EngineSetup

_MAX_SHOWN = 200  # characters of each end of Ray's error when an actor has died


class RayExecutor(RemoteExecutor):
    """See `RemoteExecutor`. Raises `ConfigError` also if the cluster cannot be joined or is too small."""

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        self._calls: list[Any] = []  # of `RankActor.serve`, in rank order; each lasts as long as its rank
        self._cluster = Cluster(setup)
        try:
            self._placement = Placement(setup)
        except BaseException:
            self._cluster.leave()
            raise
        super().__init__(setup, f"tcp://{self._cluster.own_address}:*", setup.config.cluster.timeout)

    def _launch(self, address: str) -> None:
        actors = self._placement.start(RankActor)
        self._calls = [actor.serve.remote(address, rank, len(actors)) for rank, actor in enumerate(actors)]

    def _exit_of(self, rank: int) -> str | None:
        ready, _ = self._ray.wait([self._calls[rank]], timeout=0)
        if not ready:
            return None
        try:
            self._ray.get(ready[0])
        except Exception as error:
            return f"ended: {_shortened(' '.join(str(error).split()))}"
        return "ended without an error"

    def _end(self, seconds: float) -> None:
        if self._calls and seconds:
            self._ray.wait(self._calls, num_returns=len(self._calls), timeout=seconds)
        self._calls = []
        self._placement.release()  # kills every actor in it
        self._cluster.leave()


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _MAX_SHOWN else f"{text[:_MAX_SHOWN]} [...] {text[-_MAX_SHOWN:]}"
