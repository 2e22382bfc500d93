"""A group of one rank returns what it is given."""

import pytest
import torch

from longspan.engine.rank.build import TensorParallelGroup
from longspan.models.context import Alone
from longspan.parallel.collectives import Traffic
from longspan.parallel.distributed import DistributedCollectives
from longspan.parallel.nccl import NcclCollectives
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric

CPU = torch.device("cpu")
GROUPS = {
    "threads": lambda traffic: ThreadedCollectives(ThreadFabric(1), (0,), 0, traffic),
    "gloo": lambda traffic: DistributedCollectives((0,), 0, traffic, CPU),
    "nccl": lambda traffic: NcclCollectives((0,), 0, traffic, CPU),
}


@pytest.mark.parametrize("name", GROUPS)
def test_sums_and_logits_are_the_input_itself_and_nothing_is_counted(name):
    traffic, x = Traffic(), torch.randn(3, 5)
    group = TensorParallelGroup(GROUPS[name](traffic), (5,))
    assert group.all_reduce(x) is x
    assert group.all_gather_last(x) is x
    assert traffic.calls_by_label == {}


def test_a_model_without_ranks_has_such_a_group():
    x = torch.randn(3, 5)
    assert Alone().all_reduce(x) is x
    assert Alone().all_gather_last(x) is x
