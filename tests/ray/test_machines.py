"""Which ranks share a machine, as they report it; and the addresses and interfaces that ranks use."""

from __future__ import annotations

import os

import pytest
import zmq

from longspan.config import EngineConfig, ParallelConfig
from longspan.engine.driver.executors.ray_cluster import _runs_that_fit
from longspan.engine.driver.executors.remote import _with_hosts
from longspan.engine.setup import resolve
from longspan.engine.transport.connection import detect_lost_peers, interface_of, own_address, use_interface
from tests.oracle import tiny_folder


def setup(**parallel):
    return resolve(EngineConfig(tiny_folder("llama"), parallel=ParallelConfig(**parallel)))


@pytest.mark.parametrize(
    ("hosts", "nodes"),
    [
        (["a", "a", "b", "b"], ((0, 1), (2, 3))),
        (["a", "a", "a", "b"], ((0, 1, 2), (3,))),
        (["a", "b", "b", "a"], ((0, 3), (1, 2))),
        (["a", "a", "a", "a"], ((0, 1, 2, 3),)),
    ],
)
def test_ranks_that_report_from_one_address_share_a_machine(hosts, nodes):
    found = _with_hosts(setup(prefill_context_parallel_size=4), hosts)
    assert found.grid.nodes((0, 1, 2, 3)) == nodes


def test_ranks_per_node_overrides_the_reported_hosts():
    found = _with_hosts(setup(prefill_context_parallel_size=4, ranks_per_node=2), ["a", "b", "c", "d"])
    assert found.grid.nodes((0, 1, 2, 3)) == ((0, 1), (2, 3))


@pytest.mark.parametrize(("capacities", "run", "fit"), [([4, 4], 4, 2), ([3, 3], 2, 2), ([3, 3], 4, 0), ([], 1, 0)])
def test_a_run_is_not_split_between_machines(capacities, run, fit):
    assert _runs_that_fit(capacities, run) == fit


def test_own_address_is_that_of_the_route_to_the_peer_and_belongs_to_an_interface():
    assert own_address("tcp://127.0.0.1:7850") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


def test_ranks_of_one_machine_use_the_loopback_unless_the_user_names_an_interface(monkeypatch):
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(os, "environ", {names[1]: "eth7"})
    use_interface("")
    assert [os.environ[name] for name in names] == ["lo", "eth7"]


def test_a_peer_that_sends_a_driver_too_large_a_message_is_disconnected():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as driver, context.socket(zmq.DEALER) as stranger:
        detect_lost_peers(driver, 10.0)
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stranger.linger = 0
        stranger.connect(f"tcp://127.0.0.1:{driver.bind_to_random_port('tcp://127.0.0.1')}")
        stranger.send(bytes((1 << 28) + 1), copy=False)
        assert monitor.poll(20_000)
        stranger.disable_monitor()
        monitor.close(linger=0)
