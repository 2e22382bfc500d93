"""Programs of decode work that merge the parts of a row which several of them have computed.

In Triton's interpreter programs run one after the other; what they do at the same time is tested on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from longspan.attention.backends.triton import backend as backend_module  # noqa: E402
from longspan.attention.backends.triton.backend import TritonBackend  # noqa: E402
from longspan.attention.backends.triton.config import config_for  # noqa: E402
from longspan.attention.rows import CacheRows, quantise  # noqa: E402
from longspan.attention.state import AttentionState  # noqa: E402
from longspan.cache.pages import Span  # noqa: E402
from longspan.parallel.heads import head_blocks  # noqa: E402
from longspan.plan.reach import QueryRun  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = head_blocks((0, 6), 0, 3)  # two KV heads
DIM = 40  # no power of two
PROCESSORS = 6


def decodes(*contexts: tuple[tuple[int, int], ...]) -> tuple[QueryRun, ...]:
    """A row for each context, which is a list of spans."""
    return tuple(QueryRun(row, 1, tuple(Span(*span) for span in spans)) for row, spans in enumerate(contexts))


STEPS = (  # one long row, rows of all lengths, gathered spans, and a row without columns
    decodes(((3, 1900),)),
    decodes(((0, 900),), ((900, 1),), ((905, 257),), ((20, 128),), ((1, 640),)),
    decodes(((0, 30), (50, 400), (460, 300)), ((1000, 500),), (), ((600, 7), (700, 700))),
)


def tensors(cached: torch.dtype | None = None) -> tuple[torch.Tensor, CacheRows]:
    made = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(*shape, generator=made).half() for shape in ((5, 6, DIM), (2, 2, 2000, DIM)))
    if cached is not None:
        values, scales = quantise(kv, cached, (DIM,))
        return q.to(DEVICE), CacheRows(values.to(DEVICE), scales.to(DEVICE), (DIM,))
    return q.to(DEVICE), CacheRows(kv.to(DEVICE))


def attend(runs: tuple[QueryRun, ...], cached: torch.dtype | None) -> AttentionState:
    q, kv = tensors(cached)
    return TritonBackend(DEVICE, DIM, PROCESSORS).attend(q, runs, kv, HEADS, 0.2)


def without_merges(monkeypatch) -> None:
    monkeypatch.setattr(backend_module, "config_for", lambda *given: replace(config_for(*given), merges=False))


@pytest.mark.parametrize("cached", [None, torch.int8], ids=str)
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_the_result_is_that_of_a_reduction_of_its_own(step, cached, monkeypatch):
    merged = attend(STEPS[step], cached)
    without_merges(monkeypatch)
    reduced = attend(STEPS[step], cached)
    torch.testing.assert_close(merged.out, reduced.out)
    torch.testing.assert_close(merged.lse, reduced.lse)


def test_counters_are_at_0_after_each_launch_so_that_the_next_one_merges_too():
    q, kv = tensors()
    backend = TritonBackend(DEVICE, DIM, PROCESSORS)
    refillable = backend.indexed(rows=5, index=2000)
    refillable.attend(q, kv, HEADS, 0.2)
    (plan,) = refillable.plans.plans
    for runs in STEPS:
        assert refillable.fill(runs)
        fresh = backend.attend(q, runs, kv, HEADS, 0.2)
        for _ in range(2):  # as in two layers
            part = refillable.attend(q, kv, HEADS, 0.2)
            assert torch.equal(part.out, fresh.out) and torch.equal(part.lse, fresh.lse)
            assert not plan.arrived.any()


def test_heads_of_an_item_are_adjacent_programs_and_no_reduction_is_launched(monkeypatch):
    """A recorded step has room for many more items than it has work: programs without work come last."""
    grids = []
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(
            kind, "__getitem__", lambda _, grid: lambda *given, **named: grids.append(grid), raising=False
        )
    q, kv = tensors()
    refillable = TritonBackend(DEVICE, DIM, PROCESSORS).indexed(rows=5, index=2000)
    assert refillable.fill(STEPS[1])
    refillable.attend(q, kv, HEADS, 0.2)
    (plan,) = refillable.plans.plans
    assert grids == [((plan.capacity.adjacent + plan.capacity.gathered) * 2,)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
def test_replays_of_a_graph_give_the_same_bits(dim):
    """Layers share the buffers of parts, so that a part that is read too early is one of another layer."""
    blocks = head_blocks((0, 32), 0, 4)
    backend = TritonBackend(DEVICE, dim)
    shapes = (3, 32, dim), (2, 8, 20_000, dim)
    made = [[torch.randn(*shape, device=DEVICE).bfloat16() for shape in shapes] for _ in range(4)]
    layers = [(q, CacheRows(kv)) for q, kv in made]
    refillable = backend.indexed(rows=3, index=10_000)
    runs = decodes(((0, 9000),), tuple((9000 + 20 * n, 13) for n in range(300)), ((16_000, 700),))
    refillable.attend(*layers[0], blocks, 0.1)
    assert refillable.fill(runs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = [refillable.attend(q, kv, blocks, 0.1) for q, kv in layers]
    graph.replay()
    expected = [backend.attend(q, runs, kv, blocks, 0.1) for q, kv in layers]
    first = [part.out.clone() for part in parts]
    for part, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.out, other.out, rtol=1e-3, atol=1e-3)
    for _ in range(200):
        for part in parts:
            part.out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(part.out, out) for part, out in zip(parts, first, strict=True))
    (plan,) = refillable.plans.plans
    assert not plan.arrived.any()
