"""The parts that layers are made of: matrix products, and a norm with its weight.

It owns how they are computed on each device; it must not know which slice of a weight it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.compiled.library import address, library
from longspan.models.ops.base import LayerOps, Panels

if TYPE_CHECKING:
    from longspan.models.context import TensorParallel
    from longspan.models.few_rows import FewRowsLinear

_FEW_ROWS = 128  # up to these a table's product is transposed


class DenseLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out], in the dtype of the weight.

    On a CPU a weight is repacked into oneDNN's blocked layout, if this PyTorch supports it. Measured with the 30 layers
    of SmolLM2 on two cores, plain and packed: in fp32 (AVX2) 256 rows 435 and 348 ms, 8 rows 46 and 30 ms, one row 38
    and 25 ms; in bf16 (AMX) 256 rows 59 and 48 ms, 8 rows 19 and 13 ms, one row 21 and 14 ms.
    """

    def __init__(self, weight: Tensor, pack: bool = True) -> None:
        self.out_features = weight.shape[0]
        self._packed = pack and can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        if not self._packed:
            return F.linear(x, self._weight, bias)
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._weight, bias, "none", [], "")
        return result


class PanelLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out] in fp32 on a CPU, by the compiled kernel.

    The weight is stored in panels of adjacent outputs [out / width, in, width]: every row of x reads it in order, once
    for several rows. A row's result does not depend on the other rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self._depth = weight.shape
        self._library = library()
        width = self._library.panel_width()
        values = weight.new_empty(-(-self.out_features // width), self._depth, width)
        self.panels = Panels(values, self.out_features)
        self._address = address(values)
        self._library.pack(address(weight.contiguous()), self._address, self.out_features, self._depth)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        x, rows = x.contiguous(), x.shape[0]
        out = x.new_empty(rows, self.out_features)
        self._library.product(
            address(x), self._address, None if bias is None else address(bias), out.data_ptr(), rows,
            self.out_features, self._depth,
        )  # fmt: skip
        return out


def dense_linear(weight: Tensor) -> DenseLinear | FewRowsLinear:
    """The product with a weight [out, in] as it is: on GPUs that launch kernels early by a kernel for few rows."""
    if problem_of_few_rows(weight) is not None:
        return DenseLinear(weight)
    from longspan.models.few_rows import FewRowsLinear

    return FewRowsLinear(weight)


def problem_of_few_rows(weight: Tensor) -> str | None:
    """Why a weight [out, in] is not multiplied by the kernel for few rows; None if it is."""
    if weight.device.type != "cuda" or find_spec("triton") is None:
        return "the kernel for few rows is written in Triton, for GPUs"
    from longspan.models.few_rows import problem_of_kernel

    return problem_of_kernel(weight)


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch has the packed product for a weight of this device and dtype."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16()))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiplies_bf16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AVX512_BF16 or AMX)."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()) or multiplies_bf16_tiles()


def multiplies_bf16_tiles() -> bool:
    """Whether this processor multiplies whole tiles of bfloat16 (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


class TableLinear:
    """See `table_product`, for a table [out, in]."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        product = table_product(x, self._table)
        return product if bias is None else product + bias


def table_product(x: Tensor, table: Tensor) -> Tensor:
    """x [T, in] · table [out, in]ᵀ → [T, out], for an embedding table.

    The table keeps its plain layout (oneDNN's blocked layout is not used), because rows are looked up in it too. On a
    CPU in fp32, table · xᵀ is computed and then transposed, which is faster: 9 ms instead of 17 ms for 8 rows. If x has
    a single row, it is duplicated, because two rows are faster than one: 3.5 ms instead of 11 ms. Many rows are
    multiplied plainly: it is as fast (256 rows 162 and 165 ms), and does not hold the result twice. All measured with
    SmolLM2's table on two cores.
    """
    rows = x.shape[0]
    if rows == 0 or rows > _FEW_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, table)
    if rows == 1:
        return torch.mm(table, x.repeat(2, 1).t())[:, 0][None].contiguous()
    return torch.mm(table, x.t()).t().contiguous()


@dataclass(frozen=True)
class PartialSum:
    """A sum over the TP group that is not computed yet, so that the norm behind it may do so in its own launch.

    It may be computed once only, because that may overwrite `part`.
    """

    # the group
    tp: TensorParallel
    # what this rank adds [T, hidden]
    part: Tensor
    # added to the sum [hidden]; None: nothing
    bias: Tensor | None = None

    def summed(self) -> Tensor:
        """The sum [T, hidden]."""
        total = self.tp.all_reduce(self.part)
        return total if self.bias is None else total + self.bias


@dataclass(frozen=True)
class RMSNorm:
    """A norm over rows, with its weight: see `LayerOps.norm`."""

    # what computes it
    ops: LayerOps
    # [width]
    weight: Tensor
    # added to the mean square
    eps: float

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, width] → `out`, which may be x, or a new tensor."""
        return self.ops.norm(x, self.weight, self.eps, out)

    def after_add(self, x: PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, the norm of this sum), all [T, width]."""
        found = None if x.bias is not None else x.tp.sum_add_norm(x.part, residual, self.weight, self.eps)
        return self.ops.add_norm(x.summed(), residual, self.weight, self.eps) if found is None else found
