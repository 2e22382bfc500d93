"""Sums with their norm in one launch between processes: the trial at start, and launches that follow each other.

The kernel is the real one, in Triton's interpreter; files that all processes map stand for the memory of GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")

from longspan.bench.ranks import run_on_ranks
from longspan.engine.rank.build import TensorParallelGroup
from longspan.errors import EngineError
from longspan.models.layers import PartialSum, RMSNorm
from longspan.models.ops import PlainOps
from longspan.parallel import sum_norm
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.nccl import NcclCollectives
from longspan.parallel.sum_norm import SumNorm
from longspan.parallel.symmetric import FastSums, SharedBuffers, open_symmetric_sums
from tests.folders import shared_folder

CPU = torch.device("cpu")
SIZE, FAILING = 2, 1
REASONS = {
    "nothing": "few rows in one launch with their norm",
    "allocate": "norms apart: PyTorch's symmetric memory fails: no room (member 1 of 2)",
    "compile": "norms apart: the kernel fails: no compiler (member 1 of 2)",
    "wrong": "norms apart: sums through symmetric memory are off by",
    "different": "norms apart: sums through symmetric memory differ between members",
}
TURNS = (3, 1, 3, 2, 3, 3)  # rows
WIDTH, EPS = 64, 1e-5


class _Memory:
    """Mapped files; each memory that is allocated has one for every member. `others` is a group for its own sums."""

    def __init__(self, folder: Path, rank: int, others: Any, room: int = 2) -> None:
        self.kernels = self
        self._folder, self._rank, self._others, self._room = folder, rank, others, room
        self._made = 0

    def problem(self, device: torch.device, size: int) -> str | None:
        return None

    def _map(self, member: int, elements: int) -> torch.Tensor:
        name = str(self._folder / f"{self._made} of {member}")
        return torch.from_file(name, shared=True, size=elements, dtype=torch.bfloat16)

    def allocate(self, elements: int, device: torch.device) -> torch.Tensor:
        self._made += 1
        if self._made > self._room:
            raise RuntimeError("no room")
        return self._map(self._rank, elements)

    def share(self, buffer: torch.Tensor, members: Any) -> SharedBuffers:
        return SharedBuffers(False, tuple(self._map(member, len(buffer)) for member in range(SIZE)))

    def one_shot_all_reduce_copy(self, shared: torch.Tensor, x: torch.Tensor, how: str, name: str) -> torch.Tensor:
        found = x.clone()
        dist.all_reduce(found, group=self._others)
        return found


def _no_compiler(*args: Any) -> None:
    raise TypeError("no compiler")


def _wrong(call: Callable[..., Any], *args: Any) -> Any:
    total, out = call(*args)
    return total, 2 * out


def _different(call: Callable[..., Any], *args: Any) -> Any:
    total, out = call(*args)
    out[-1, -1] *= 1 + 2**-7
    return total, out


def _failing(step: str, rank: int) -> Any:
    """What replaces a method of `SumNorm` on the member that fails; `wrong` are all."""
    call = SumNorm.__call__
    replaced: dict[str, Any] = {
        "compile": ("compile", _no_compiler),
        "wrong": ("__call__", lambda *args: _wrong(call, *args)),
        "different": ("__call__", lambda *args: _different(call, *args)),
        "stuck": ("__call__", lambda *_: Event().wait()),
    }
    fails = step in replaced and (rank == FAILING or step == "wrong")
    name, method = replaced[step] if fails else ("__call__", call)
    return patch.object(SumNorm, name, method)


def _follow(sums: FastSums, rank: int) -> list[Any]:
    """Totals, norms and what was sent, of launches that follow each other; one member reads late."""
    meet, counted = sum_norm.meet, Traffic()

    def late(*args: Any) -> None:
        meet(*args)
        time.sleep(0.05 * (rank == FAILING))

    group = NcclCollectives(range(SIZE), rank, counted, CPU)
    group._sums = sums
    tp, norm = TensorParallelGroup(group, (1,)), RMSNorm(PlainOps(), torch.ones(WIDTH, dtype=torch.bfloat16), EPS)
    numbers = [[_numbers(turn, part) for part in range(SIZE + 1)] for turn in range(len(TURNS))]
    with patch.object(sum_norm, "meet", late):
        found = [norm.after_add(PartialSum(tp, parts[rank]), parts[SIZE]) for parts in numbers]
    return [[(total.tolist(), out.tolist()) for total, out in found], counted.bytes_by_label]


def _numbers(turn: int, part: int) -> torch.Tensor:
    """Whole numbers [rows, WIDTH] of few bits: their sums are exact in bf16."""
    generator = torch.Generator().manual_seed(10 * turn + part)
    return torch.randint(-16, 17, (TURNS[turn], WIDTH), generator=generator).to(torch.bfloat16)


def _all_steps(folder: Path, rank: int, make_group: Callable[..., Collectives], traffic: Traffic) -> dict[str, Any]:
    """For each step that fails: whether sums are used, with their norm too, and why."""
    members, others = dist.new_group(range(SIZE)), dist.new_group(range(SIZE))
    found: dict[str, Any] = {}
    for step in REASONS:
        room = 1 if step == "allocate" and rank == FAILING else 2
        (folder / step).mkdir(exist_ok=True)
        with _failing(step, rank):
            sums, how = open_symmetric_sums(members, CPU, _Memory(folder / step, rank, others, room))
        found[step] = sums is not None, sums is not None and sums.with_norm is not None, how
        if step == "nothing":
            found["in turn"] = _follow(sums, rank)
    (folder / "stuck").mkdir(exist_ok=True)
    try:
        with _failing("stuck", rank):
            open_symmetric_sums(members, CPU, _Memory(folder / "stuck", rank, others), 3.0)
    except EngineError as error:
        found["stuck"] = str(error)
    make_group(range(SIZE)).all_reduce(torch.zeros(1), "barrier")  # no rank may leave before all are done
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_on_ranks("processes", SIZE, partial(_all_steps, shared_folder("sum-norm")))


@pytest.mark.parametrize("step", REASONS)
def test_what_fails_on_a_member_leaves_sums_without_norms_on_all(results, step):
    used, with_norm, reasons = zip(*(found[step] for found in results), strict=True)
    assert used == (True,) * SIZE
    assert with_norm == (step == "nothing",) * SIZE
    assert len(set(reasons)) == 1
    assert reasons[0].startswith(f"symmetric memory for up to 8 MiB, else NCCL; {REASONS[step]}")


def test_a_kernel_that_waits_for_a_member_for_ever_is_an_error_with_a_remedy(results):
    for found in results:
        assert "use --disable-custom-all-reduce" in found["stuck"]


def test_no_member_overwrites_what_another_has_not_read(results):
    """Members run a turn ahead of one that reads late; then each has its own, and the right, sums."""
    for found in results:
        launches, sent = found["in turn"]
        assert sent == {"tp": sum(TURNS) * WIDTH * 2 * (SIZE - 1)}
        for turn, (total, out) in enumerate(launches):
            expected = sum(_numbers(turn, part).float() for part in range(SIZE + 1))
            assert torch.equal(torch.tensor(total), expected)
            normed = expected * (expected.square().mean(-1, keepdim=True) + EPS).rsqrt()
            torch.testing.assert_close(torch.tensor(out), normed, rtol=0.02, atol=0.02)
    assert results[0]["in turn"] == results[1]["in turn"]
