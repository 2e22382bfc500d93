"""Products on a CPU with weights that are stored in 16 or 8 bits, whatever the checkpoint has.

Each row of activations is quantised by itself, and each row of a weight by itself, so that a product does not depend on
what else is in a step. Int8 only serves products whose inputs are whole on every rank: where the inputs are split over
ranks, so would be the elements that a scale is made of. Thus tokens do not depend on the layout.

It owns the forms; it must not know how one is chosen.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.compiled.blocks import quantised
from longspan.models.blocks import BlockLinear
from longspan.models.context import Linear
from longspan.models.layers import PanelLinear, dense_linear

_WEIGHT_LEVELS = 127
# activations have 7 bits: without VNNI a processor adds pairs of 8-bit products in 16 bits, which more would overflow
_ROW_LEVELS, _ROW_ZERO = 63, 64
_TOLERANCE = {"fp16": 0.002, "int8": 0.05}  # largest error that a sound form has, relative to the largest element


class HalfLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out], with a weight rounded to fp16 and sums in fp32 (FBGEMM)."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features = weight.shape[0]
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out], in the dtype of x."""
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float().contiguous(), self._weight).to(x.dtype)
        return product if bias is None else product.add_(bias)


class Int8Linear:
    """x [T, in] → x̂ · ŵᵀ + bias [out], where each row of x and of the weight is rounded to integers with a scale.

    A weight [out, in] has 8 bits, x has 7. Integers are summed exactly.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features = weight.shape[0]
        weight = weight.float()
        scales = (weight.abs().amax(1) / _WEIGHT_LEVELS).clamp_min(torch.finfo(torch.float32).tiny).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensors of this kind are deprecated, the packed product needs one
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            stored = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._weight = torch.ops.quantized.linear_prepack(stored, None)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out], in the dtype of x."""
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        rows = x.float()
        scales = rows.abs().amax(1, keepdim=True).div_(_ROW_LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / scales, 1.0, _ROW_ZERO, self._weight
        )
        product = product.mul_(scales).to(x.dtype)
        return product if bias is None else product.add_(bias)


def linear_in_form(weight: Tensor, form: str, *, is_whole: bool) -> Linear:
    """The product with a weight [out, in] in a form of `config/products.py`.

    `is_whole` says that its inputs are not split over ranks under any layout, and that it may have 8 bits.
    """
    match form:
        case "plain":
            return dense_linear(weight)
        case "panels":
            return PanelLinear(weight)
        case "blocks":  # of 4 bits, for what is measured: weights of a file are never rounded
            return BlockLinear(quantised(weight))
    return Int8Linear(weight) if form == "int8" and is_whole else HalfLinear(weight)


def problem_of_form(form: str) -> str | None:
    """Why this processor or this PyTorch cannot compute a form; None if it can. Computes a small product."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return f"PyTorch {torch.__version__} is built without FBGEMM"
    try:
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
        error = largest_error(weight, form)
    except (RuntimeError, AttributeError, NotImplementedError) as error_of_torch:
        return f"PyTorch's product fails: {str(error_of_torch).splitlines()[0]}"
    return None if error < _TOLERANCE[form] else f"PyTorch's product is off by {error:.1%}"


def largest_error(weight: Tensor, form: str) -> float:
    """The largest error of a product with normal activations, relative to the largest element of the fp32 product."""
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(1))
    expected = F.linear(x, weight.float())
    found = linear_in_form(weight, form, is_whole=True)(x)
    return float((found - expected).abs().max() / expected.abs().max())
