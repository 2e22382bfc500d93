"""Activations rounded to FP8 by one kernel: the same numbers as by plain operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from longspan.models.fused_rounding import round_rows
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear, problem_of_kernel, round_plainly
from tests.gpu.launches import META, counted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (
    [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
)  # the interpreter has no bf16
SIZES = [(1, 4, 128), (3, 4, 384), (16, 16, 128), (37, 40, 256)]


def rand(*shape: int) -> torch.Tensor:
    """Numbers of all magnitudes."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[-1])[torch.randperm(shape[-1])]


def exact(tokens: int, columns: int) -> torch.Tensor:
    """Numbers that need no rounding, of another magnitude in each group of 128 columns."""
    generator = torch.Generator().manual_seed(tokens + columns)
    numbers = torch.randint(-14, 15, (tokens, columns // BLOCK, BLOCK), generator=generator).float()
    numbers[..., 5] = -14.0  # the largest of a group: its scale is a power of two
    return (numbers * 2.0 ** torch.arange(-3, columns // BLOCK - 3)[:, None]).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_scales_are_those_of_plain_operations_and_so_are_values_that_need_no_rounding(tokens, rows, columns, dtype):
    """Triton's interpreter rounds to 8 bits in its own way: what is rounded is compared on a GPU, below."""
    x = exact(tokens, columns).to(DEVICE, dtype)
    values, scales = round_rows(x, rows)
    expected, expected_scales = round_plainly(x, rows)
    assert torch.equal(scales, expected_scales) and scales.t().is_contiguous()
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(values.float()[:tokens] * scales[:tokens].repeat_interleave(BLOCK, 1), x.float())
    x = rand(tokens, columns).to(DEVICE, dtype)
    assert torch.equal(round_rows(x, rows)[1], round_plainly(x, rows)[1])


def test_rows_may_be_parts_of_wider_ones_and_columns_apart():
    x = rand(5, 512).to(DEVICE)
    for part in (x[:, 128:384], x[:, ::2]):
        assert torch.equal(round_rows(part, 8)[1], round_plainly(part, 8)[1])


@pytest.mark.gpu
def test_values_on_a_gpu_are_those_of_plain_operations_bit_for_bit():
    x = rand(37, 1024).to(DEVICE, torch.bfloat16)
    (values, scales), (expected, expected_scales) = round_rows(x, 40), round_plainly(x, 40)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1024, 7168])
def test_a_product_of_what_the_kernel_rounds_is_pytorchs_of_what_plain_operations_round(columns):
    device = torch.device("cuda")
    if problem := problem_of_kernel(device):
        pytest.skip(problem)
    values = rand(256, columns).clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond this they would be NaN
    weight = BlockScaled(values.to(device), torch.rand(2, columns // BLOCK).to(device))
    x = rand(37, columns).to(device, torch.bfloat16)
    fused, plain = BlockScaledLinear(weight, fused=True), BlockScaledLinear(weight, fused=True)
    plain._round = round_plainly
    assert torch.equal(fused(x), plain(x))


def test_it_is_one_launch():
    x = torch.empty(5, 7168, dtype=torch.bfloat16, device=META)
    with counted() as launches:
        round_rows(x, 8)
    assert launches.names == ["round_kernel"]
