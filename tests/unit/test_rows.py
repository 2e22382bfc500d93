"""Quantised cache rows: what is stored, what is read back, what travels."""

import pytest
import torch

from longspan.attention.rows import CacheRows, quantise, through
from longspan.cache.pages import Span

DTYPES = [torch.int8, torch.float8_e4m3fn]


def rows_of(x, dtype, groups):
    return CacheRows(*quantise(x, dtype, groups), groups)


@pytest.mark.parametrize(("dtype", "step"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)], ids=str)
def test_an_element_is_off_by_half_a_step_of_its_format_at_most(dtype, step):
    """int8 has even steps of a 127th of the largest; fp8_e4m3 has three bits behind the leading one."""
    x = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    error = (rows_of(x, dtype, (16,)).read(torch.float32) - x).abs()
    allowed = x.abs().amax(-1, keepdim=True) * step if dtype == torch.int8 else x.abs() * step + 1e-4
    assert (error <= allowed * 1.001).all()


def test_groups_have_scales_of_their_own():
    """MLA's rotary key may be a hundred times as large as its latent."""
    x = torch.cat([torch.full((1, 1, 1, 8), 0.01), torch.full((1, 1, 1, 4), 100.0)], dim=-1)
    torch.testing.assert_close(rows_of(x, torch.int8, (8, 4)).read(torch.float32), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_reads_as_zeros(dtype):
    x = torch.zeros(2, 1, 3, 8)
    assert torch.equal(rows_of(x, dtype, (8,)).read(torch.float32), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [(16,), (12, 4)], ids=str)
def test_rows_arrive_as_they_were_packed(dtype, groups):
    rows = rows_of(torch.randn(2, 3, 40, 16), dtype, groups)
    spans = (Span(3, 5), Span(30, 10), Span(0, 1))
    packed = rows.take(spans).packed()
    assert packed.shape == (2, 3, 16, 16 + 4 * len(groups))
    assert packed.element_size() == 1  # a byte an element and four a scale: nothing is dequantised on its way
    arrived = rows.unpacked(packed.clone())
    assert torch.equal(arrived.read(torch.float32), rows.take(spans).read(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fresh_row_is_attended_as_it_will_be_read(dtype):
    x = torch.randn(7, 3, 16)
    cache = rows_of(x.transpose(0, 1)[None], dtype, (16,))
    assert torch.equal(through(x, cache), cache.read(torch.float32)[0].transpose(0, 1))


def test_rows_as_the_model_computes_them_are_left_alone():
    x = torch.randn(2, 3, 40, 16)
    rows = CacheRows(x)
    assert rows.packed() is x
    assert rows.read(torch.float32) is x
    assert through(x, rows) is x
