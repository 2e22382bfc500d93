"""Symmetric memory that fails on one member, at each step: all members answer, and all let NCCL sum.

Processes over gloo stand for those of GPUs, and a fake for PyTorch's memory: sharing it waits for all members.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.bench.ranks import run_on_ranks
from longspan.errors import EngineError
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.symmetric import SharedBuffers, open_symmetric_sums

CPU = torch.device("cpu")
SIZE, FAILING = 3, 1
STEPS = ("nothing", "problem", "allocate", "share", "hang", "launch", "sum")
REASONS = {
    "nothing": "symmetric memory for up to 8 MiB, else NCCL; norms apart: one launch is for 2, 4, 8 GPUs",
    "problem": "NCCL: too old (member 1 of 3)",
    "allocate": "NCCL: PyTorch's symmetric memory fails: no room (member 1 of 3)",
    "share": "NCCL: PyTorch's symmetric memory fails: nothing happens",
    "hang": "NCCL: PyTorch's symmetric memory fails: nothing happens",
    "launch": "NCCL: PyTorch's symmetric memory fails: no such kernel (member 1 of 3)",
    "sum": "NCCL: sums through symmetric memory",
}


class _Memory:
    """Memory that fails at one step on one member. `others` is a group for its own waiting."""

    def __init__(self, failing: str, rank: int, others: Any) -> None:
        self.kernels = self
        self._failing = failing if rank == FAILING else ""
        self._hangs = failing == "stuck kernel"
        self._others = others
        self._shares = failing not in ("share", "hang")
        self.shared = 0

    def problem(self, device: torch.device, size: int) -> str | None:
        return "too old" if self._failing == "problem" else None

    def allocate(self, elements: int, device: torch.device) -> torch.Tensor:
        if self._failing == "allocate":
            raise RuntimeError("no room\nat some line")
        return torch.zeros(elements, dtype=torch.bfloat16)

    def share(self, buffer: torch.Tensor, members: Any) -> SharedBuffers:
        self.shared += 1
        if self._failing == "share":
            raise RuntimeError("cannot map it")
        if not self._shares:
            Event().wait()
        return SharedBuffers(False, ())

    def two_shot_all_reduce_(self, shared: torch.Tensor, how: str, name: str) -> None:
        if self._hangs:
            Event().wait()
        dist.all_reduce(shared, group=self._others)
        if self._failing == "launch":
            raise RuntimeError("no such kernel")
        if self._failing == "sum":
            shared += 1


def _all_steps(rank: int, make_group: Callable[..., Collectives], traffic: Traffic) -> dict[str, Any]:
    """For each step that fails: whether symmetric memory is used, why, and how often it was shared."""
    members, others = dist.new_group(range(SIZE)), dist.new_group(range(SIZE))
    found: dict[str, Any] = {}
    for step in STEPS:
        memory = _Memory(step, rank, others)
        patience = 0.5 if step in ("share", "hang") else 60.0
        summing, how = open_symmetric_sums(members, CPU, memory, patience)
        found[step] = summing is not None, how, memory.shared
    try:
        open_symmetric_sums(members, CPU, _Memory("stuck kernel", rank, others), 0.5)
    except EngineError as error:
        found["stuck kernel"] = str(error)
    make_group(range(SIZE)).all_reduce(torch.zeros(1), "barrier")  # no rank may leave before all are done
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_on_ranks("processes", SIZE, _all_steps)


@pytest.mark.parametrize("step", STEPS)
def test_all_members_decide_alike_and_say_whose_step_has_failed(results, step):
    used, reasons, _ = zip(*(found[step] for found in results), strict=True)
    assert used == (step == "nothing",) * SIZE
    assert len(set(reasons)) == 1
    assert reasons[0].startswith(REASONS[step])


@pytest.mark.parametrize("step", ["problem", "allocate"])
def test_nobody_waits_for_a_member_that_cannot_share(results, step):
    assert [found[step][2] for found in results] == [0] * SIZE


def test_a_kernel_that_does_not_end_is_an_error_with_a_remedy(results):
    for found in results:
        assert "use --disable-custom-all-reduce" in found["stuck kernel"]
