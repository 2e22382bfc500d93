"""What one layer launches, and what else it computes: counted on tensors without data, where nothing is launched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface

from longspan.attention.attend import Attention
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.refillable import RefillableStep, StepSize
from longspan.attention.schedules import ContextGroup
from longspan.attention.step_buffer import StepBuffer
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import ExpansionCost
from longspan.cache.layout import KVLayout
from longspan.cache.pages import PageRef, PageTable
from longspan.config import ParallelConfig
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, StepPlan
from longspan.plan.reach import Place
from longspan.plan.view import RankView, rank_view
from longspan.request import SamplingParams

META = torch.device("meta")
PAGE, HEADS, KV_HEADS, DIM = 16, 8, 2, 128
FREE = ("empty", "view", "slice", "select", "transpose", "split", "alias", "unsqueeze", "as_strided", "detach")


class Operations(TorchDispatchMode):
    """Counts the operations that a device would be given: all but allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not any(free in name for free in FREE):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def attention(window: int | None = None, cache: torch.dtype = torch.bfloat16) -> Attention:
    """One layer of a world of one rank, on tensors without data."""
    grid = Grid(ParallelConfig(1, 1, 1))
    quantised = cache != torch.bfloat16
    layout = KVLayout(1, KV_HEADS, DIM, 2, scale_groups=(DIM,) if quantised else ())
    heads = Heads.of(Sharding(grid, 0, HEADS, KV_HEADS))
    ops = AttentionOps(TritonBackend(META, DIM, 132), heads, DIM**-0.5, DIM, ExpansionCost())
    pool = KVPool(layout, (0,), 4096, PAGE, cache, META)
    return Attention(pool, ops, ContextGroup(None, grid.shards_of_pcp, ((0,),), 1 << 20), (window,))


def view(
    of: Attention, segments: list[tuple[int, int]], prefill: bool = True, causal_runs: bool | None = None
) -> RankView:
    """A step of one segment [start, stop) for each request, whose pages are adjacent."""
    known: dict[str, KnownRequest] = {}
    wanted: list[Segment] = []
    page = 0
    for number, (start, stop) in enumerate(segments):
        table = PageTable(PAGE, 1)
        for _ in range(-(-stop // PAGE)):
            table.append(PageRef(0, page))
            page += 1
        name = str(number)
        known[name] = KnownRequest(table, stop, 0, SamplingParams(), [])
        wanted.append(Segment(name, start, (0,) * (stop - start), 0, prefill, 0, sample=1))
    plan = StepPlan(1, (), (), (), (), (), tuple(wanted), ("local",), ("local",))
    causal_runs = of.causal_runs if causal_runs is None else causal_runs
    return rank_view(plan, known, Place(0, 0, ((0,),)), of.windows, of.moves, causal_runs)


def launched(of: Attention, rows: int, monkeypatch) -> tuple[list[str], Counter[str], torch.Tensor]:
    """(kernels launched by one layer, other operations, the result)."""
    kernels: list[str] = []

    def launcher(kernel, grid):
        return lambda *args, **options: kernels.append(kernel.fn.__name__)

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    sizes = HEADS, KV_HEADS, KV_HEADS
    q, k, v = (torch.empty(rows, heads, DIM, dtype=torch.bfloat16, device=META) for heads in sizes)
    of(AttentionLayer(0, of.windows[0]), q, k, v)  # plans are made in the first layer
    kernels.clear()
    with Operations() as operations:
        out = of(AttentionLayer(0, of.windows[0]), q, k, v)
    return kernels, operations.found, out


DECODE = [(n, n + 1) for n in (900, 2000, 17)]
FIRST, LATER, MIXED = [(0, 2000)], [(4000, 6000)], [(0, 700), (4000, 4300), (64, 66)]
CASES = {
    "decode": (DECODE, False), "first chunk": (FIRST, True), "later chunk": (LATER, True),
    "64 prompts of 128 tokens": ([(0, 128)] * 64, True), "prompts, chunks and a prefix hit": (MIXED, True),
    "drafts": ([(900, 905), (2000, 2001), (17, 20)], False),
}  # fmt: skip


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_writes_attends_and_reduces_and_does_nothing_else(case, window, cache, monkeypatch):
    segments, prefill = CASES[case]
    of = attention(window, cache)
    seen = view(of, segments, prefill)
    of.begin(of.preparer.step(seen))
    kernels, others, out = launched(of, len(seen.positions), monkeypatch)
    assert kernels in (["_write_kernel", "attend_kernel"], ["_write_kernel", "attend_kernel", "reduce_kernel"])
    assert not others - Counter({"_to_copy": 1}), others  # the interpreter is given fp32 queries
    assert out.dtype == torch.bfloat16
    assert out.shape == (len(seen.positions), HEADS, DIM)


@pytest.mark.parametrize("case", ["first chunk", "64 prompts of 128 tokens"])
def test_diagonals_alone_are_one_launch_and_nothing_is_merged(case, monkeypatch):
    """As where the cache is on several ranks: segments attend to their own keys, and here to no earlier ones."""
    of = attention()
    seen = view(of, CASES[case][0], causal_runs=False)
    of.begin(of.preparer.step(seen))
    kernels, others, out = launched(of, len(seen.positions), monkeypatch)
    assert [name for name in kernels if name != "reduce_kernel"] == ["_write_kernel", "attend_kernel"]
    assert not others - Counter({"_to_copy": 1}), others
    assert out.dtype == torch.bfloat16


def test_diagonals_and_earlier_keys_are_merged_into_the_models_dtype(monkeypatch):
    of = attention()
    seen = view(of, [*LATER, (0, 50), (100, 120)], causal_runs=False)
    of.begin(of.preparer.step(seen))
    kernels, others, out = launched(of, len(seen.positions), monkeypatch)
    assert [name for name in kernels if name != "reduce_kernel"] == [
        "_write_kernel", "attend_kernel", "attend_kernel", "_merge_kernel",
    ]  # fmt: skip
    assert not others - Counter({"_to_copy": 2}), others
    assert out.dtype == torch.bfloat16


def test_a_recorded_decode_layer_is_two_launches(monkeypatch):
    of = attention()
    buffer = StepBuffer(META)
    step = RefillableStep(of.preparer, of.ops.backend, StepSize(4, None, 1), of.pool.slots, buffer)
    of.begin(step.fill(view(of, DECODE, False)))
    kernels, others, _ = launched(of, 4, monkeypatch)
    assert kernels == ["_write_kernel", "attend_kernel"]
    assert not others - Counter({"_to_copy": 1}), others


def test_a_step_of_both_phases_attends_twice_and_joins_the_results(monkeypatch):
    of = attention()
    decode, prefill = view(of, DECODE, False), view(of, MIXED)
    both = of.preparer.step(decode).phases + tuple(
        type(each)(each.start + 3, each.stop + 3, each.groups) for each in of.preparer.step(prefill).phases
    )
    rows = 3 + len(prefill.positions)
    of.begin(type(of.preparer.step(decode))(both, of.ops.backend.writer((), rows)))
    kernels, others, _ = launched(of, rows, monkeypatch)
    assert kernels.count("attend_kernel") == 2 and kernels.count("_write_kernel") == 1
    assert set(others) <= {"_to_copy", "cat"} and others["cat"] == 2  # out and lse
