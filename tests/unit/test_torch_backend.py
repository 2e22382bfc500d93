"""The torch backend gives what the definition of attention gives, on any shape, and holds few scores at once."""

import pytest
import torch

from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows, quantise
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock, head_blocks
from longspan.plan.reach import QueryRun

CPU = torch.device("cpu")
SCALE = 0.3
GQA = (HeadBlock(0, 6, 0, 2),)
RUNS = (QueryRun(0, 1, (Span(3, 9),)), QueryRun(2, 3, (Span(20, 1), Span(0, 2), Span(30, 7))), QueryRun(5, 1, ()))


def inputs(tokens=7, q_heads=6, kv_heads=2, dim=8, slots=40, kv_factor=2):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(tokens, q_heads, dim, dtype=torch.float64, generator=generator)
    kv = torch.randn(kv_factor, kv_heads, slots, dim, dtype=torch.float64, generator=generator)
    return q, CacheRows(kv)


def assert_same(part, expected, tolerance=1e-12):
    torch.testing.assert_close(part.out, expected.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(part.lse, expected.lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize("max_scores", [1, 100, 1 << 24])
@pytest.mark.parametrize("kv_factor", [1, 2])
def test_attention_over_spans_does_not_depend_on_the_blocks(max_scores, kv_factor):
    q, kv = inputs(kv_factor=kv_factor)
    part = TorchBackend(CPU, max_scores).attend(q, RUNS, kv, GQA, SCALE)
    assert_same(part, ReferenceBackend().attend(q, RUNS, kv, GQA, SCALE))


def test_rows_of_no_run_and_of_empty_runs_see_nothing():
    q, kv = inputs()
    part = TorchBackend(CPU).attend(q, RUNS, kv, GQA, SCALE)
    assert part.lse[[1, 5, 6]].isneginf().all()
    assert not part.out[[1, 5, 6]].any()


@pytest.mark.parametrize("max_scores", [1, 1 << 24])
def test_lows_hide_the_first_tokens_of_a_row_even_all_of_them(max_scores):
    q, kv = inputs()
    runs = (QueryRun(1, 4, (Span(5, 3), Span(11, 4)), (0, 2, 6, 7)),)
    part = TorchBackend(CPU, max_scores).attend(q, runs, kv, GQA, SCALE)
    assert_same(part, ReferenceBackend().attend(q, runs, kv, GQA, SCALE))
    assert part.lse[4].isneginf().all()


@pytest.mark.parametrize("max_scores", [1, 1 << 24])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_diagonal_is_causal_and_values_may_be_narrower(window, max_scores):
    q, kv = inputs(tokens=19)
    k, v = kv.values[0, :, :19].transpose(0, 1), kv.values[1, :, :19, :5].transpose(0, 1)
    part = TorchBackend(CPU, max_scores).causal(q, k, v, GQA, SCALE, window)
    assert part.out.shape == (19, 6, 5)
    assert_same(part, ReferenceBackend().causal(q, k, v, GQA, SCALE, window))


@pytest.mark.parametrize(
    "backend", [ReferenceBackend(), TorchBackend(CPU), CpuBackend()], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("window", [None, 5])
def test_without_values_the_rows_of_keys_are_values_too(backend, window):
    q, kv = inputs(tokens=19, kv_heads=1)
    k, heads = kv.values[0, :, :19].transpose(0, 1), (HeadBlock(0, 6, 0, 1),)
    part = backend.causal(q, k, None, heads, SCALE, window)
    assert_same(part, ReferenceBackend().causal(q, k, k, heads, SCALE, window))


def test_more_rows_than_a_block_holds():
    q, kv = inputs(tokens=600, q_heads=1, kv_heads=1, slots=600)
    k, v = (plane.transpose(0, 1) for plane in kv.values)
    one = (HeadBlock(0, 1, 0, 1),)
    assert_same(TorchBackend(CPU).causal(q, k, v, one, SCALE, 300), ReferenceBackend().causal(q, k, v, one, SCALE, 300))


def test_heads_that_begin_inside_a_group():
    blocks = head_blocks((2, 8), 0, 3)
    assert len(blocks) > 1
    q, kv = inputs(kv_heads=3)
    part = TorchBackend(CPU).attend(q, RUNS, kv, blocks, SCALE)
    assert_same(part, ReferenceBackend().attend(q, RUNS, kv, blocks, SCALE))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_rows_are_read_back_in_blocks(dtype):
    q, kv = inputs()
    quantised = CacheRows(*quantise(kv.values, dtype, (5, 3)), (5, 3))
    part = TorchBackend(CPU, 200).attend(q, RUNS, quantised, GQA, SCALE)
    assert_same(part, ReferenceBackend().attend(q, RUNS, quantised, GQA, SCALE))


def test_bfloat16_inputs_are_computed_in_float32():
    q, kv = inputs()
    q, kv = q.bfloat16(), CacheRows(kv.values.bfloat16())
    part = TorchBackend(CPU).attend(q, RUNS, kv, GQA, SCALE)
    assert part.out.dtype == part.lse.dtype == torch.float32
    exact = ReferenceBackend().attend(q.double(), RUNS, CacheRows(kv.values.double()), GQA, SCALE)
    assert (part.out - exact.out).abs().max() < 1e-5
