"""Sums through memory that all members of a group read: which kernel sums how much, and that results are their own.

PyTorch has the kernels for GPUs only; here threads that exchange tensors stand for them.
"""

from __future__ import annotations

import pytest
import torch

from longspan.bench.ranks import run_on_ranks
from longspan.parallel.symmetric import SymmetricSum

MIB = 1 << 20


class Kernels:
    """`torch.ops.symm_mem` over collectives of threads; says what was called with how many elements."""

    def __init__(self, group):
        self.group, self.called = group, []

    def one_shot_all_reduce_copy(self, shared, x, how, name):
        self.called.append(("one shot", len(shared)))
        shared.copy_(x)
        return self.group.all_reduce(shared.clone(), "x")

    def two_shot_all_reduce_(self, shared, how, name):
        self.called.append(("two shot", len(shared)))
        shared.copy_(self.group.all_reduce(shared.clone(), "x"))

    def multimem_all_reduce_(self, shared, how, name):
        self.called.append(("multicast", len(shared)))
        shared.copy_(self.group.all_reduce(shared.clone(), "x"))


def sums_of(size, counts, multicast):
    """A function of a rank: what it is given, the sums, and what was called."""

    def sum_all(rank, make_group, traffic):
        group = make_group(tuple(range(size)))
        kernels = Kernels(group)
        found = SymmetricSum(torch.zeros(4 * MIB, dtype=torch.bfloat16), "name", group.size, multicast, kernels)
        given = [
            torch.full((2, count // 2), rank + number, dtype=torch.bfloat16) for number, count in enumerate(counts)
        ]
        return given, [found(x) for x in given], kernels.called

    return sum_all


@pytest.mark.parametrize(
    ("size", "multicast", "kinds"),
    [
        (2, False, ["one shot", "one shot", "one shot"]),
        (3, False, ["two shot", "two shot", "two shot"]),
        (4, True, ["one shot", "one shot", "multicast"]),
        (8, False, ["one shot", "two shot", "two shot"]),
    ],
)
def test_few_bytes_are_read_whole_by_all_members_whose_order_is_the_same(size, multicast, kinds):
    counts = (16, 256 << 10, 1 << 20)
    for given, found, called in run_on_ranks("threads", size, sums_of(size, counts, multicast)):
        assert called == list(zip(kinds, counts, strict=True))
        for number, (x, total) in enumerate(zip(given, found, strict=True)):
            assert total.shape == x.shape
            assert (total == sum(rank + number for rank in range(size))).all()  # also after the later sums


@pytest.mark.parametrize(
    ("x", "taken"),
    [
        (torch.zeros(4, 8, dtype=torch.bfloat16), True),
        (torch.zeros(4 * MIB, dtype=torch.bfloat16), True),
        (torch.zeros(4 * MIB + 8, dtype=torch.bfloat16), False),
        (torch.zeros(4, 8), False),
        (torch.zeros(3, dtype=torch.bfloat16), False),
        (torch.zeros(0, 8, dtype=torch.bfloat16), False),
    ],
    ids=["few", "as many as fit", "too many", "fp32", "not aligned", "none"],
)
def test_nccl_sums_what_the_memory_does_not_take(x, taken):
    assert SymmetricSum(torch.zeros(4 * MIB, dtype=torch.bfloat16), "name", 2, False, Kernels(None)).takes(x) == taken
