"""Sums through PyTorch's symmetric memory between processes that share one GPU: eager, captured and in turn.

Kernels of two processes run in turn on one GPU, so a kernel that waits for another process takes milliseconds. What one
GPU cannot show is their speed, and sums by the switch between several.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.parallel.symmetric import FastSums, open_symmetric_sums

pytestmark = pytest.mark.gpu
SIZE = 2


def _sum_in_turn(rank: int, device: torch.device, sums: FastSums) -> Any:
    summing = sums.plain
    x = torch.zeros(64, 128, dtype=torch.bfloat16, device=device)
    graph = torch.cuda.CUDAGraph()
    summing(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = summing(x)
    found = []
    for value in (1.0, 3.0):
        x.fill_(value + rank)
        graph.replay()
        eager = summing(x * 2)
        found.append((captured.unique().tolist(), eager.unique().tolist()))
    return found


def _sum_with_norms_in_turn(rank: int, device: torch.device, sums: FastSums) -> Any:
    """For launches of several shapes, eager and from two graphs: whether they give the bits of two operations."""
    from longspan.models.ops.triton import TritonOps

    with_norm, ops = sums.with_norm, TritonOps()
    if with_norm is None:
        return None
    generator = torch.Generator(device)

    def numbers(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator.manual_seed(seed)).to(torch.bfloat16)

    def compared(x: Tensor, residual: Tensor, weight: Tensor, found: tuple[Tensor, Tensor]) -> bool:
        expected = ops.add_norm(sums.plain(x), residual, weight, 1e-5)
        return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    shapes = (1, 4096), (64, 2880)
    inputs = [(numbers(rank, *shape), numbers(8, *shape), numbers(9, shape[1])) for shape in shapes]
    graphs, captured = [torch.cuda.CUDAGraph() for _ in shapes], []
    for given, graph in zip(inputs, graphs, strict=True):
        with_norm(*given, 1e-5)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured.append(with_norm(*given, 1e-5))
    same = []
    for turn, which in enumerate((0, 1, 1, 0, 0, 1)):
        x, residual, weight = inputs[which]
        x.copy_(numbers(20 + SIZE * turn + rank, *x.shape))
        graphs[which].replay()
        eager = with_norm(x * 2, residual, weight, 1e-5)
        same += [compared(x, residual, weight, captured[which]), compared(x * 2, residual, weight, eager)]
    return same


def _rank(rank: int, store: str, results: Any, compute: Callable[[int, torch.device, FastSums], Any]) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    sums, how = open_symmetric_sums(dist.group.WORLD, device)
    results.put((how, None if sums is None else compute(rank, device, sums)))
    dist.barrier()
    dist.destroy_process_group()


def _on_all_ranks(compute: Callable[[int, torch.device, FastSums], Any], store: str) -> list[tuple[str, Any]]:
    """How each rank sums, and what it has computed."""
    context = get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, store, results, compute)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    try:
        return [results.get(timeout=100) for _ in ranks]
    finally:
        for process in ranks:
            process.terminate()
            process.join()


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")


def test_two_processes_of_one_gpu_sum_eager_and_captured_in_turn(tmp_path):
    for how, found in _on_all_ranks(_sum_in_turn, str(tmp_path / "store")):
        assert found == [([3.0], [6.0]), ([7.0], [14.0])], how


def test_sums_with_their_norm_in_one_launch_have_the_bits_of_two_operations(tmp_path):
    """Of two members' sum both forms round once. Launches of other rows and widths, and of two graphs, are mixed."""
    for how, same in _on_all_ranks(_sum_with_norms_in_turn, str(tmp_path / "store")):
        assert same == [True] * 12, how
