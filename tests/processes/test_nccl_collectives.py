"""`NcclCollectives`, run over gloo on CPUs: the same results and bytes as `DistributedCollectives`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.attention.schedules.ring import circulate
from longspan.bench.ranks import run_on_ranks
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.nccl import NcclCollectives
from longspan.parallel.symmetric import FastSums, SymmetricSum

CPU = torch.device("cpu")
SIZE = 3
DTYPES = (torch.bfloat16, torch.float32)  # symmetric memory takes the first


def _tensor(member: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(member))


def _gather(group: Collectives) -> list[torch.Tensor]:
    return group.all_gather(_tensor(group.rank, 4, 3), [4] * group.size, "x")


def _gather_uneven(group: Collectives) -> list[torch.Tensor]:
    return group.all_gather(_tensor(group.rank, group.rank, 3), list(range(group.size)), "x")


def _all_to_all(group: Collectives) -> list[torch.Tensor]:
    sends = [_tensor(10 * group.rank + to, to + group.rank, 2) for to in range(group.size)]
    return group.all_to_all(sends, [(group.rank + source, 2) for source in range(group.size)], "x")


def _reduce(group: Collectives) -> list[torch.Tensor]:
    return [group.all_reduce(_tensor(group.rank, 5).double(), "x")]


def _reduce_scatter(group: Collectives) -> list[torch.Tensor]:
    return [group.reduce_scatter(_tensor(group.rank, 2 * group.size, 3).double(), [2] * group.size, "x")]


def _reduce_scatter_uneven(group: Collectives) -> list[torch.Tensor]:
    rows = list(range(group.size))
    return [group.reduce_scatter(_tensor(group.rank, sum(rows), 3).double(), rows, "x")]


def _ring(group: Collectives) -> list[torch.Tensor]:
    shapes = [(owner, 2) for owner in range(group.size)]  # the first member sends no rows
    return [x.clone() for _, x in circulate(group, _tensor(group.rank, group.rank, 2), shapes, "x")]


def _pass_on(group: Collectives) -> list[torch.Tensor]:
    """As between pipeline stages: several tensors, one after the other, from each member to the next."""
    first, last = group.rank == 0, group.rank == group.size - 1
    found = []
    for number in range(12):
        x = _tensor(number, 3) if first else group.receive((3,), torch.float32, group.rank - 1)
        found.append(x)
        if not last:
            group.send(x + 1, group.rank + 1, "x")
    return found


OPERATIONS: dict[str, Callable[[Collectives], list[torch.Tensor]]] = {
    "gather": _gather,
    "uneven gather": _gather_uneven,
    "all to all": _all_to_all,
    "reduce": _reduce,
    "reduce and scatter": _reduce_scatter,
    "uneven reduce and scatter": _reduce_scatter_uneven,
    "ring": _ring,
    "pipeline": _pass_on,
}


class _Shared:
    """`torch.ops.symm_mem`, by the backend of torch.distributed."""

    def __init__(self, members: Any) -> None:
        self._members, self.called = members, 0

    def one_shot_all_reduce_copy(self, shared: torch.Tensor, x: torch.Tensor, how: str, name: str) -> torch.Tensor:
        self.called += 1
        found = x.clone()
        dist.all_reduce(found, group=self._members)
        return found


def _both(rank: int, make_group: Callable[..., Collectives], traffic: Traffic) -> dict[str, Any]:
    """The results and bytes of every operation, on a group of three and one of two, with both kinds of collectives."""
    found: dict[str, Any] = {}
    for members in ((0, 1, 2), (0, 2)):
        if rank not in members:
            continue
        counted = Traffic()
        grouped = NcclCollectives(members, rank, counted, CPU)
        plain = make_group(members)
        for name, operation in OPERATIONS.items():
            counted.reset(), traffic.reset()
            ours, expected = operation(grouped), operation(plain)
            found[f"{name} of {len(members)}"] = (
                [x.tolist() for x in ours], [x.tolist() for x in expected],
                dict(counted.bytes_by_label), dict(traffic.bytes_by_label),
            )  # fmt: skip
        found[f"how {len(members)} sum"] = grouped.open_fast_sums()
        shared = torch.zeros(64, dtype=torch.bfloat16)
        kernels = _Shared(grouped._members)
        grouped._sums = FastSums(SymmetricSum(shared, "name", 2, False, kernels), None)
        counted.reset()
        sums = [grouped.all_reduce(torch.full((8,), rank + 1.0, dtype=dtype), "x") for dtype in DTYPES]
        found[f"sums of {len(members)}"] = [x.tolist() for x in sums], dict(counted.bytes_by_label), kernels.called
    make_group((0, 1, 2)).all_reduce(torch.zeros(1), "barrier")  # no rank may leave before all are done
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_on_ranks("processes", SIZE, _both)


@pytest.mark.parametrize("members", [3, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_results_and_bytes_of_the_gloo_collectives(results, name, members):
    of_ranks = [found[f"{name} of {members}"] for found in results if f"{name} of {members}" in found]
    assert len(of_ranks) == members
    for ours, expected, sent, counted in of_ranks:
        if name == "reduce":  # another order of summing
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected))
        else:
            assert ours == expected
        assert sent == counted


@pytest.mark.parametrize("members", [(0, 1, 2), (0, 2)])
def test_sums_through_symmetric_memory_are_counted_as_others_and_its_lack_is_said(results, members):
    total, peers = sum(rank + 1.0 for rank in members), len(members) - 1
    for rank in members:
        sums, sent, called = results[rank][f"sums of {len(members)}"]
        assert called == 1
        assert sums == [[total] * 8] * 2
        assert sent == {"x": peers * 8 * (2 + 4)}
        assert results[rank][f"how {len(members)} sum"] == (False, "NCCL: symmetric memory is for GPUs")


def test_a_group_of_one_sends_nothing():
    group = NcclCollectives([5], 5, Traffic(), CPU)
    x = torch.ones(2)
    assert group.all_reduce(x, "x") is x
    assert group.all_gather(x, [2], "x")[0] is x
    assert not group.traffic.bytes_by_label.get("x")
