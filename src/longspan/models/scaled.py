"""Products with weights that stay in FP8, one scale for each block of 128 rows and 128 columns.

It owns how activations are rounded and how both are multiplied, by PyTorch's own kernel or plainly; it must not know
where weights come from or which slice of one it holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # rows and columns of a weight, columns of an activation, that share a scale (DeepSeek-V3, 2024, 3.3.2)
_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_ROWS_TOGETHER = 4  # the kernel takes activations' rows, and scales along the inner dimension, in fours
_CAPABILITY = 9  # Hopper's alone; Blackwell's scales are others
_TOLERANCE = 0.01


class BlockScaled(NamedTuple):
    """A weight: FP8 `values` [out, in] and fp32 `scales` [out / 128, in / 128], both sizes multiples of 128."""

    values: Tensor
    scales: Tensor


class BlockScaledLinear:
    """x [T, in] → x̂ · weightᵀ + bias [out], where x̂ is x rounded to FP8 with a scale for each row's 128 columns.

    With `fused` the product is PyTorch's `scaled_mm`, else the same is computed in fp32 from the weight dequantised.
    """

    def __init__(self, weight: BlockScaled, fused: bool = False) -> None:
        self.out_features = weight.values.shape[0]
        self._weight = weight
        padding = -weight.scales.shape[1] % _ROWS_TOGETHER
        self._inner_first = F.pad(weight.scales, (0, padding)).t() if fused else None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product, in x's dtype."""
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        product = self._plain(x) if self._inner_first is None else self._fused(x, self._inner_first)
        return product if bias is None else product + bias

    def _plain(self, x: Tensor) -> Tensor:
        values, scales = rounded(x)
        left = values.float() * scales.repeat_interleave(BLOCK, 1)
        return F.linear(left, multiplied_out(self._weight)).to(x.dtype)

    def _fused(self, x: Tensor, weight_scales: Tensor) -> Tensor:
        rows = x.shape[0]
        values, scales = rounded(F.pad(x, (0, 0, 0, -rows % _ROWS_TOGETHER)))
        torch_functional: Any = F  # whose stubs may be older than the function
        kinds = torch_functional.ScalingType
        product: Tensor = torch_functional.scaled_mm(
            values, self._weight.values.t(),
            scales.t().contiguous().t(), kinds.BlockWise1x128,
            weight_scales, kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip
        return product[:rows].to(x.dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 [T, in] and the fp32 scales [T, in / 128] that bring each row's largest of 128 columns to FP8's largest."""
    groups = x.float().unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    scales = (groups.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (groups / scales[..., None]).flatten(1).to(_FP8), scales


def multiplied_out(weight: BlockScaled) -> Tensor:
    """The weight in fp32, [out, in]."""
    return weight.values.float() * weight.scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def problem_of_kernel(device: torch.device) -> str | None:
    """Why `fused` is not to be had on this device, or None. Asks the kernel for a small product and compares it."""
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
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3 * BLOCK, 5 * BLOCK, generator=generator).to(_FP8)
    weight = BlockScaled(values.to(device), (torch.rand(3, 5, generator=generator) + 0.5).to(device))
    x = torch.randn(7, 5 * BLOCK, generator=generator).to(device, torch.bfloat16)
    expected = BlockScaledLinear(weight)(x).float()
    error = (BlockScaledLinear(weight, fused=True)(x).float() - expected).abs().max() / expected.abs().max()
    return None if error < _TOLERANCE else f"PyTorch's scaled_mm is off by {float(error):.1%}"
