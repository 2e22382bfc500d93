"""Sums through PyTorch's symmetric memory between processes that share one GPU: eager, captured and in turn.

What one GPU cannot show is its speed, and sums by the switch between several.
"""

from __future__ import annotations

from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.parallel.symmetric import open_symmetric_sum

pytestmark = pytest.mark.gpu
SIZE = 2


def _rank(rank: int, store: str, results: Any) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    summing, how = open_symmetric_sum(dist.group.WORLD, device)
    if summing is None:
        results.put((rank, how, None))
        return
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
    results.put((rank, how, found))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_of_one_gpu_sum_eager_and_captured_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    context = get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    try:
        for _, how, found in [results.get(timeout=50) for _ in ranks]:
            assert found == [([3.0], [6.0]), ([7.0], [14.0])], how
    finally:
        for process in ranks:
            process.terminate()
            process.join()
