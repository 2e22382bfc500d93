"""A Ray cluster for the ranks: joins or starts one, and reserves resources on its machines.

It owns the connection and the placement group; it must not know what the actors do.
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
_WARN_SECONDS = 2.0
_CONNECT_SECONDS = 1.0
_POLL_SECONDS = 0.5
# the client preface of HTTP/2 (gRPC) with empty settings
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4  # fourth byte of an HTTP/2 server's reply
_TLS_ALERT = 21  # first byte of the reply of a server that expects TLS


def import_ray() -> ModuleType:
    """Ray, which is an extra of this package. Raises `ConfigError` if it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "executor", "ray", f"Ray is not installed ({error})", "run pip install 'longspan[ray]'"
        ) from error


class Cluster:
    """The connection of this process to a cluster: the one at the configured address, or a new one on this machine.

    If this process is already connected to a cluster, by the caller's `ray.init`, that one is used and left open.
    Raises `ConfigError`.
    """

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._join(setup)

    @property
    def own_address(self) -> str:
        """This machine's address in the cluster."""
        return str(self._ray.util.get_node_ip_address())

    def leave(self) -> None:
        """Disconnect. A cluster that was started here ends. May be called more than once."""
        if self._joined:
            self._ray.shutdown()
        self._joined = False

    def _join(self, setup: EngineSetup) -> None:
        address = setup.config.cluster.ray_address
        size: dict[str, Any] = {}
        if address is None:
            cpus = setup.grid.world_size  # one for each rank, also if the machine has fewer cores
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
            if threading.current_thread() is threading.main_thread():  # `ray.init` has replaced the handler
                signal.signal(signal.SIGTERM, handler)


class Placement:
    """The resources for the ranks: a placement group with one bundle for each run of ranks that must share a machine.

    By default a run is a TP group, and runs are packed onto few machines. If `ranks_per_node` is set, a run has that
    many ranks instead, and runs are spread over machines. Raises `ConfigError` if the resources are not free within
    `cluster_timeout` seconds.
    """

    def __init__(self, setup: EngineSetup) -> None:
        self._ray = import_ray()
        parallel, grid = setup.config.parallel, setup.grid
        self._resource = "GPU" if setup.device_type == "cuda" else "CPU"
        run = min(parallel.ranks_per_node or grid.tp, grid.world_size)
        self._runs = [min(run, grid.world_size - first) for first in range(0, grid.world_size, run)]
        self._wait_for_dead_machines(setup.config.cluster.timeout)
        strategy = "SPREAD" if parallel.ranks_per_node else "PACK"
        self._group = self._ray.util.placement_group([{self._resource: size} for size in self._runs], strategy)
        try:
            self._wait(setup)
        except BaseException:
            self.release()
            raise

    def start(self, actor: type) -> list[Any]:
        """Start one actor for each rank, in rank order. Runs on the same machine get consecutive ranks."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        node_of = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        nodes = list(dict.fromkeys(node_of.values()))
        bundles = sorted(node_of, key=lambda bundle: nodes.index(node_of[bundle]))
        kind = {"num_gpus": 1, "num_cpus": 0} if self._resource == "GPU" else {"num_cpus": 1}
        remote = self._ray.remote(actor)
        return [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle), **kind).remote()
            for bundle in bundles
            for _ in range(self._runs[bundle])
        ]

    def release(self) -> None:
        """Remove the placement group, which kills its actors. May be called more than once."""
        group, self._group = self._group, None
        if group is not None:  # not a second time: a call of Ray after `ray.shutdown` would start a new cluster
            with suppress(Exception):  # the cluster may have ended, and the group with it
                self._ray.util.remove_placement_group(group)

    def _wait_for_dead_machines(self, timeout: float) -> None:
        """Wait until Ray has removed machines that cannot be reached.

        Otherwise it might place ranks on them, and only notice minutes later.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not all(map(_is_reachable, self._machines())):
            time.sleep(_POLL_SECONDS)

    def _machines(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _wait(self, setup: EngineSetup) -> None:
        timeout = setup.config.cluster.timeout
        deadline = time.monotonic() + timeout
        if self._group.wait(min(_WARN_SECONDS, timeout)):
            return
        _LOG.warning("waiting up to %.0f s for resources: %s", timeout, self._shortage())
        if not self._group.wait(max(0.0, deadline - time.monotonic())):
            raise ConfigError("executor", "ray", self._shortage(), self._remedy(setup))

    def _capacities(self) -> list[int]:
        """The GPUs or CPUs of each machine, in use or not."""
        return [int(node["Resources"].get(self._resource, 0)) for node in self._machines()]

    def _shortage(self) -> str:
        """What the layout needs and what the cluster has."""
        capacities = self._capacities()
        each = f" in runs of {max(self._runs)} on one machine" if max(self._runs) > 1 else ""
        busy = " that others use" if _runs_that_fit(capacities, max(self._runs)) >= len(self._runs) else ""
        return (
            f"the layout needs {sum(self._runs)} {self._resource}s{each}, and the cluster's machines have "
            f"{' + '.join(map(str, capacities)) or 0}{busy}"
        )

    def _remedy(self, setup: EngineSetup) -> str:
        """The largest layout that would fit, or what else to do."""
        capacities, grid = self._capacities(), setup.grid
        groups = _runs_that_fit(capacities, grid.tp) // grid.pp
        if groups >= grid.pcp:
            return "wait for them, or end what uses them"
        fits = f"use --prefill-context-parallel-size {groups}" if groups else ""
        if not fits and max(capacities, default=0) >= 1:
            fits = f"use --tensor-parallel-size {max(capacities)}"
        return f"{fits or 'start a machine that has some'}, or add machines with `ray start --address`"


def _runs_that_fit(capacities: Sequence[int], run: int) -> int:
    """How many runs of `run` ranks fit on machines with these capacities. A run is not split between machines."""
    return sum(capacity // run for capacity in capacities)


def _is_reachable(node: dict[str, Any]) -> bool:
    """Whether a machine of the cluster can be reached.

    True also if it refuses the connection: then only Ray has ended there, which the cluster notices at once.
    """
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_SECONDS):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _probe(address: str) -> None:
    """Raise `ConfigError` unless a gRPC server answers at the address, as Ray's control service would.

    `ray.init` itself would try for minutes.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _PROBE_SECONDS) as probe:
            probe.sendall(_HTTP2_PREFACE)
            answer = probe.recv(9)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            "ray_address", address, f"no server answers there ({error})",
            "give HOST:PORT as `ray start --head` prints it, or leave it out to start Ray on this machine",
        ) from error  # fmt: skip
    if not answer or (answer[0] != _TLS_ALERT and answer[3:4] != bytes([_SETTINGS])):
        raise ConfigError(
            "ray_address", address, "what answers there is not Ray", "give HOST:PORT as `ray start --head` prints it"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
