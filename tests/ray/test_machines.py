"""Which ranks share a machine: as they report it, in whatever order they are spread."""

from __future__ import annotations

import pytest

from longspan.config import EngineConfig, ParallelConfig
from longspan.engine.driver.executors.ray_cluster import _fitting
from longspan.engine.driver.executors.remote import _placed
from longspan.engine.setup import resolve
from longspan.engine.transport.connection import interface_of, own_address
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
    found = _placed(setup(prefill_context_parallel_size=4), hosts)
    assert found.grid.nodes((0, 1, 2, 3)) == nodes


def test_a_user_who_names_the_machines_is_believed():
    found = _placed(setup(prefill_context_parallel_size=4, ranks_per_node=2), ["a", "b", "c", "d"])
    assert found.grid.nodes((0, 1, 2, 3)) == ((0, 1), (2, 3))


@pytest.mark.parametrize(("room", "run", "fit"), [([4, 4], 4, 2), ([3, 3], 2, 2), ([3, 3], 4, 0), ([], 1, 0)])
def test_runs_fit_only_whole_on_a_machine(room, run, fit):
    assert _fitting(room, run) == fit


def test_the_own_address_is_the_one_towards_the_peer_and_names_an_interface():
    assert own_address("tcp://127.0.0.1:7850") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None
