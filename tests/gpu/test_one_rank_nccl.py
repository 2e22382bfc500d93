"""NCCL on a single GPU: a communicator of one rank that is not skipped, eager, captured and replayed, mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from longspan.parallel.collectives import Traffic
from longspan.parallel.nccl import NcclCollectives
from longspan.parallel.world import join_world, leave_world

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Iterator[NcclCollectives]:
    """A group of one whose operations go through NCCL, which a real group of one leaves out."""
    join_world(0, 1, str(tmp_path_factory.mktemp("world") / "store"), DEVICE)
    found = NcclCollectives((0,), 0, Traffic(), DEVICE)
    found._members = dist.new_group([0])
    yield found
    leave_world()


def reduce(group: NcclCollectives, x: torch.Tensor) -> torch.Tensor:
    return group.all_reduce(x + 1, "x")


def gather(group: NcclCollectives, x: torch.Tensor) -> torch.Tensor:
    return group.all_gather(x + 1, [len(x)], "x")[0]


def shift(group: NcclCollectives, x: torch.Tensor) -> torch.Tensor:
    return group.start_shift(x + 1, 0, tuple(x.shape), 0, "x")()


OPERATIONS = [reduce, gather, shift]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_exact_eager_and_captured_in_turn(
    group: NcclCollectives, operation: Callable[[NcclCollectives, torch.Tensor], torch.Tensor]
) -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    assert torch.equal(operation(group, x), x + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = operation(group, x)
    for value in (5.0, 7.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(captured, x + 1)
        assert torch.equal(operation(group, x * 2), x * 2 + 1)
