"""A Ray cluster as a place for ranks: joining or starting one, and room on its machines.

It owns the connection and the placement group; it must not know what runs there.
"""

from __future__ import annotations

import importlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from longspan.engine.setup import EngineSetup
from longspan.errors import ConfigError

_LOG = logging.getLogger("longspan.engine")
_PROBE_SECONDS = 5.0
_SAY_SECONDS = 2.0
_ANSWER_SECONDS = 1.0
_LOOK_SECONDS = 0.5
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS, _TLS_ALERT = 4, 21  # where an HTTP/2 server's answer, and that of one behind TLS, say what they are


def import_ray() -> ModuleType:
    """Ray, which is an extra of this package. Raises `ConfigError` without it."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "executor", "ray", f"Ray is not installed ({error})", "run pip install 'longspan[ray]'"
        ) from error


class Cluster:
    """A driver's membership in a cluster: the one at an address, or one of its own on this machine.

    Whoever has called `ray.init` in this process already keeps that cluster. Raises `ConfigError`.
    """

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._join(setup)

    @property
    def own_address(self) -> str:
        """Of this machine, as the others know it."""
        return str(self._ray.util.get_node_ip_address())

    def leave(self) -> None:
        """Leave the cluster, which ends if it was started here; safe to call again."""
        if self._joined:
            self._ray.shutdown()
        self._joined = False

    def _join(self, setup: EngineSetup) -> None:
        address = setup.config.cluster.ray_address
        size: dict[str, Any] = {}
        if address is None:
            cpus = setup.grid.world_size  # a machine of our own may run more ranks than it has cores
            size = {"num_cpus": cpus, "include_dashboard": False}
        else:
            _probe(address)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **size)
        except Exception as error:
            raise ConfigError(
                "ray_address", address or "(a new one)", f"Ray cannot be started or joined ({_one_line(error)})",
                "run `ray start --address HOST:PORT` on this machine too, with the cluster's Ray and Python",
            ) from error  # fmt: skip
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray has put its own in its place
                signal.signal(signal.SIGTERM, handler)


class Placement:
    """Room for the ranks: a placement group of one bundle for each run of ranks that must share a machine.

    A run is a TP group, or what the user has said; runs are packed onto few machines, or spread if the user has said
    how many ranks a machine gets. Raises `ConfigError` if there is no room within the configuration's patience.
    """

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        parallel, grid = setup.config.parallel, setup.grid
        self._kind = "GPU" if setup.device_type == "cuda" else "CPU"
        run = min(parallel.ranks_per_node or grid.tp, grid.world_size)
        self._runs = [min(run, grid.world_size - first) for first in range(0, grid.world_size, run)]
        self._settle(setup.config.cluster.timeout)
        strategy = "SPREAD" if parallel.ranks_per_node else "PACK"
        self._group = self._ray.util.placement_group([{self._kind: size} for size in self._runs], strategy)
        try:
            self._wait(setup)
        except BaseException:
            self.release()
            raise

    def start(self, actor: type) -> list[Any]:
        """One actor for each rank, in rank order: neighbours on the same machine where runs are."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        node_of = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        nodes = list(dict.fromkeys(node_of.values()))
        bundles = sorted(node_of, key=lambda bundle: nodes.index(node_of[bundle]))
        kind = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": 1}
        remote = self._ray.remote(actor)
        return [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle), **kind).remote()
            for bundle in bundles
            for _ in range(self._runs[bundle])
        ]

    def release(self) -> None:
        """Give the room back, ending whatever runs there; safe to call again."""
        group, self._group = self._group, None
        if group is not None:  # once only: after it has left a cluster, Ray would start a new one for a second call
            with suppress(Exception):  # the cluster may be gone, and the room with it
                self._ray.util.remove_placement_group(group)

    def _settle(self, patience: float) -> None:
        """Wait until Ray knows of machines that are gone: it would give ranks to them, and wait for minutes."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not all(map(_answers, self._machines())):
            time.sleep(_LOOK_SECONDS)

    def _machines(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _wait(self, setup: EngineSetup) -> None:
        patience = setup.config.cluster.timeout
        deadline = time.monotonic() + patience
        if self._group.wait(min(_SAY_SECONDS, patience)):
            return
        _LOG.warning("waiting up to %.0f s for room: %s", patience, self._lack())
        if not self._group.wait(max(0.0, deadline - time.monotonic())):
            raise ConfigError("executor", "ray", self._lack(), self._remedy(setup))

    def _room(self) -> list[int]:
        return [int(node["Resources"].get(self._kind, 0)) for node in self._machines()]

    def _lack(self) -> str:
        room = self._room()
        each = f" in runs of {max(self._runs)} on one machine" if max(self._runs) > 1 else ""
        busy = " that others use" if _fitting(room, max(self._runs)) >= len(self._runs) else ""
        return (
            f"the layout needs {sum(self._runs)} {self._kind}s{each}, and the cluster's machines have "
            f"{' + '.join(map(str, room)) or 0}{busy}"
        )

    def _remedy(self, setup: EngineSetup) -> str:
        room, grid = self._room(), setup.grid
        groups = _fitting(room, grid.tp) // grid.pp
        if groups >= grid.pcp:
            return "wait for them, or end what uses them"
        fits = f"use --prefill-context-parallel-size {groups}" if groups else ""
        if not fits and max(room, default=0) >= 1:
            fits = f"use --tensor-parallel-size {max(room)}"
        return f"{fits or 'start a machine that has some'}, or add machines with `ray start --address`"


def _fitting(room: Sequence[int], run: int) -> int:
    """How many runs fit on machines with so much room."""
    return sum(free // run for free in room)


def _answers(node: dict[str, Any]) -> bool:
    """Whether a machine of the cluster can be reached, if only to say that Ray has ended there: that, Ray notices."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _probe(address: str) -> None:
    """Raise `ConfigError` unless something like Ray's control service answers: `ray.init` would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _PROBE_SECONDS) as probe:
            probe.sendall(_HTTP2_HELLO)
            answer = probe.recv(9)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            "ray_address", address, f"nobody answers there ({error})",
            "give HOST:PORT as `ray start --head` prints it, or leave it out to start Ray on this machine",
        ) from error  # fmt: skip
    if not answer or (answer[0] != _TLS_ALERT and answer[3:4] != bytes([_SETTINGS])):
        raise ConfigError(
            "ray_address", address, "what answers there is not Ray", "give HOST:PORT as `ray start --head` prints it"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
