"""Products with weights that stay in FP8, with one scale for each block of 128 rows and 128 columns.

It owns the rounding of activations and the product, by PyTorch's `scaled_mm` or in fp32; it must not know where weights
come from, nor which slice of a weight it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # rows and columns of a weight, and columns of an activation, with one scale (DeepSeek-V3, 2024, 3.3.2)
_FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(_FP8).max  # what the largest magnitude of a group is mapped to
LEAST = torch.finfo(torch.float32).tiny  # the least scale: that of a group of zeros
_ROWS_TOGETHER = 4  # the kernel wants a multiple of 4 rows of activations, and of scales along the inner dimension
_CAPABILITY = 9  # Hopper only; Blackwell wants scales in another format
_TOLERANCE = 0.01  # largest error of the kernel, relative to the largest element of the expected result


class BlockScaled(NamedTuple):
    """A weight in FP8. Its sizes are multiples of 128."""

    # [out, in] float8_e4m3fn
    values: Tensor
    # [out / 128, in / 128] fp32
    scales: Tensor


class BlockScaledLinear:
    """x [T, in] → x̂ · weightᵀ + bias [out], where x̂ is x rounded to FP8 with a scale for each 128 columns of a row.

    With `fused` the product is PyTorch's `scaled_mm`, else it is computed in fp32 from the dequantised weight.
    """

    def __init__(self, weight: BlockScaled, fused: bool = False) -> None:
        self.out_features = weight.values.shape[0]
        self._weight = weight
        padding = -weight.scales.shape[1] % _ROWS_TOGETHER
        self._inner_first = F.pad(weight.scales, (0, padding)).t() if fused else None
        self._round = choose_rounding(weight.values.device)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out], in the dtype of x."""
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        product = self._plain(x) if self._inner_first is None else self._fused(x, self._inner_first)
        return product if bias is None else product + bias

    def _plain(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out], in fp32 with the dequantised weight."""
        values, scales = rounded(x)
        left = values.float() * scales.repeat_interleave(BLOCK, 1)
        return F.linear(left, dequantised(self._weight)).to(x.dtype)

    def _fused(self, x: Tensor, weight_scales: Tensor) -> Tensor:
        """x [T, in] → [T, out], with `scaled_mm`. Rows are padded to a multiple of 4."""
        rows = x.shape[0]
        values, scales = self._round(x, rows + -rows % _ROWS_TOGETHER)
        torch_functional: Any = F  # its type stubs may be older than scaled_mm
        kinds = torch_functional.ScalingType
        product: Tensor = torch_functional.scaled_mm(
            values, self._weight.values.t(),
            scales, kinds.BlockWise1x128,
            weight_scales, kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip
        return product[:rows].to(x.dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] as FP8 values [T, in] and fp32 scales [T, in / 128], so that x is about values · scales.

    A scale maps the largest magnitude of its 128 elements to the largest FP8 number.
    """
    groups = x.float().unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    # divided by a tensor, because by a number PyTorch multiplies with its rounded reciprocal on a GPU
    scales = (groups.abs().amax(-1) / groups.new_full((), LARGEST)).clamp_min(LEAST)
    return (groups / scales[..., None]).flatten(1).to(_FP8), scales


def round_plainly(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`rounded` x [T, in] with zeros behind it up to `rows` rows. The scales of a column are adjacent."""
    values, scales = rounded(F.pad(x, (0, 0, 0, rows - len(x))))
    return values, scales.t().contiguous().t()


def choose_rounding(device: torch.device) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """`round_plainly`, or on a GPU its kernel."""
    if device.type != "cuda":
        return round_plainly
    try:
        from longspan.models.fused_rounding import round_rows
    except ImportError:  # no Triton
        return round_plainly
    return round_rows


def dequantised(weight: BlockScaled) -> Tensor:
    """The dequantised weight [out, in], in fp32."""
    return weight.values.float() * weight.scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def problem_of_kernel(device: torch.device) -> str | None:
    """Why `fused` cannot be used on this device; None if it can. Runs the kernel once and compares the result."""
    if device.type != "cuda":
        return "PyTorch has no such product on a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major != _CAPABILITY:
        return f"PyTorch has such a product for compute capability {_CAPABILITY}.x, this GPU's is {major}.{minor}"
    if not hasattr(F, "scaled_mm"):
        return f"PyTorch {torch.__version__} has no scaled_mm"
    try:
        return _difference(device)
    except RuntimeError as error:
        return f"PyTorch's scaled_mm fails: {str(error).splitlines()[0]}"


def _difference(device: torch.device) -> str | None:
    """Compare the kernel with the fp32 product on a small random weight. None if both agree."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3 * BLOCK, 5 * BLOCK, generator=generator).to(_FP8)
    weight = BlockScaled(values.to(device), (torch.rand(3, 5, generator=generator) + 0.5).to(device))
    x = torch.randn(7, 5 * BLOCK, generator=generator).to(device, torch.bfloat16)
    expected = BlockScaledLinear(weight)(x).float()
    error = (BlockScaledLinear(weight, fused=True)(x).float() - expected).abs().max() / expected.abs().max()
    return None if error < _TOLERANCE else f"PyTorch's scaled_mm is off by {float(error):.1%}"
