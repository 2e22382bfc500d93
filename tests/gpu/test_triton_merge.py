"""The merge kernel gives what `partial.merge` gives, and reads partials where they lie."""

import pytest
import torch

from longspan.attention.schedules.base import pack, unpack
from longspan.attention.state import AttentionState, merge

pytest.importorskip("triton")

from longspan.attention.backends.triton.merge import merge_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def partials(count, tokens=5, heads=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        AttentionState(
            torch.randn(tokens, heads, dim, generator=generator).to(DEVICE),
            (torch.randn(tokens, heads, generator=generator) * 4).to(DEVICE),
        )
        for _ in range(count)
    ]


def assert_same(part, expected):
    torch.testing.assert_close(part.out, expected.out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(part.lse, expected.lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 40])
def test_any_number_of_parts(count):
    parts = partials(count)
    assert_same(merge_parts(parts), merge(parts))


@pytest.mark.parametrize("dim", [1, 64, 80, 512, 576])
def test_any_width(dim):
    parts = partials(3, dim=dim)
    assert_same(merge_parts(parts), merge(parts))


def test_more_rows_than_one_program_takes():
    parts = partials(2, tokens=61, heads=7, dim=128)
    assert_same(merge_parts(parts), merge(parts))


def test_packed_states_and_slices_of_them_beside_whole_ones():
    whole, *others = partials(4, tokens=6, heads=4)
    travelled = [pack(part) for part in others]
    parts = [whole, unpack(travelled[0]), *(unpack(packed) for packed in travelled[1:])]
    assert_same(merge_parts(parts), merge(parts))
    parts = [AttentionState(part.out[1:4, 2:], part.lse[1:4, 2:]) for part in parts]
    assert_same(merge_parts(parts), merge(parts))


def test_states_with_heads_before_tokens():
    parts = [AttentionState(part.out.transpose(0, 1), part.lse.transpose(0, 1)) for part in partials(2)]
    assert_same(merge_parts(parts), merge(parts))


def test_a_part_of_weight_0_is_skipped_whatever_it_holds():
    parts = partials(3)
    parts[1].out[2] = float("nan")
    parts[1].lse[2] = -INF
    parts[2].out[4] = INF
    parts[2].lse[4] = -1e4  # no -inf, and yet e to it is 0
    merged = merge_parts(parts)
    assert merged.out.isfinite().all()
    assert_same(merged, merge(parts))


def test_where_no_part_saw_anything_the_result_is_the_identity():
    parts = [AttentionState.empty(2, 3, 8, part.out) for part in partials(3)]
    merged = merge_parts(parts)
    assert merged.lse.isneginf().all()
    assert not merged.out.any()


def test_scores_of_any_size_do_not_overflow():
    parts = partials(2)
    parts = [AttentionState(part.out, part.lse + 1e4) for part in parts]
    assert_same(merge_parts(parts), merge(parts))


def test_the_result_may_be_written_in_the_dtype_of_the_model():
    parts = partials(20, dim=40)
    merged = merge_parts(parts, torch.float16)
    assert torch.equal(merged.out, merge_parts(parts).out.half())
    assert merged.lse.dtype == torch.float32


def test_parts_without_rows():
    merged = merge_parts(partials(2, tokens=0))
    assert merged.out.shape == (0, 3, 8)
    assert merged.lse.shape == (0, 3)


@pytest.mark.gpu
def test_rows_beyond_32_bit_offsets():
    part = AttentionState(torch.randn(40_000, 128, 512, device="cuda"), torch.randn(40_000, 128, device="cuda"))
    merged = merge_parts([part, part])
    torch.testing.assert_close(merged.out[-1], part.out[-1])
    torch.testing.assert_close(merged.lse[-1], part.lse[-1] + 0.6931472)
