"""Ranks as Ray actors: Ray finds the machines, starts the processes and tells of their end.

It owns the actors; data and steps travel as between any remote ranks.
"""

from __future__ import annotations

from typing import Any

from longspan.engine.driver.executors.ray_cluster import Cluster, Placement, import_ray
from longspan.engine.driver.executors.remote import RemoteExecutor
from longspan.engine.rank.ray_rank import RankActor
from longspan.engine.setup import EngineSetup

_SHOWN = 200  # characters of the beginning and of the end of what Ray says of an actor's death


class RayExecutor(RemoteExecutor):
    """See `RemoteExecutor`. Raises `ConfigError` too if the cluster cannot be joined or has no room for the ranks."""

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        self._lives: list[Any] = []
        self._cluster = Cluster(setup)
        try:
            self._placement = Placement(setup)
        except BaseException:
            self._cluster.leave()
            raise
        super().__init__(setup, f"tcp://{self._cluster.own_address}:*", setup.config.cluster.timeout)

    def _launch(self, address: str) -> None:
        actors = self._placement.start(RankActor)
        self._lives = [actor.serve.remote(address, rank, len(actors)) for rank, actor in enumerate(actors)]

    def _end_of(self, rank: int) -> str | None:
        ready, _ = self._ray.wait([self._lives[rank]], timeout=0)
        if not ready:
            return None
        try:
            self._ray.get(ready[0])
        except Exception as error:
            return f"ended: {_shortened(' '.join(str(error).split()))}"
        return "ended without a word"

    def _end(self, seconds: float) -> None:
        if self._lives and seconds:
            self._ray.wait(self._lives, num_returns=len(self._lives), timeout=seconds)
        self._lives = []
        self._placement.release()  # with every actor in it
        self._cluster.leave()


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}"
