"""The fast forms of a product equal the plain one, and the norm equals PyTorch's."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.models.layers import DenseLinear, table_product
from longspan.models.ops import PlainOps


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 17, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_gives_the_plain_product(rows, bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    offset = torch.randn(40) if bias else None
    with torch.inference_mode():
        plain, packed = DenseLinear(weight, pack=False), DenseLinear(weight)
        torch.testing.assert_close(packed(x, offset), plain(x, offset), atol=1e-5, rtol=1e-5)


def test_a_packed_weight_takes_rows_of_any_strides():
    x, weight = torch.randn(24, 6).t(), torch.randn(40, 24)
    with torch.inference_mode():
        torch.testing.assert_close(DenseLinear(weight)(x), F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 200])
def test_a_tables_product_is_the_plain_one_and_contiguous(rows):
    x, table = torch.randn(rows, 24), torch.randn(40, 24)
    found = table_product(x, table)
    torch.testing.assert_close(found, F.linear(x, table), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()


class Results(TorchDispatchMode):
    """Records the elements of each result that shares no memory with what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements.append(found.numel())
        return found


def test_a_tables_product_with_many_rows_is_held_once():
    x, table = torch.randn(200, 24), torch.randn(400, 24)
    with torch.inference_mode(), Results() as results:
        table_product(x, table)
    assert sum(results.elements) == 200 * 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_pytorchs(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32).to(dtype), torch.randn(32).to(dtype)
    expected = F.rms_norm(x.float(), (32,), weight.float(), 1e-5)
    torch.testing.assert_close(
        PlainOps().norm(x, weight, 1e-5).float(), expected, atol=2e-2 if dtype != torch.float32 else 1e-6, rtol=0
    )
