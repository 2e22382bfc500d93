"""Products with weights that stay in MXFP4, one after the other.

It owns the plain product, which is the reference of the kernels in `expert_forms.py`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from longspan.compiled.mxfp4 import mxfp4_numbers


class PackedLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out], with a weight that is dequantised for each product.

    `values` uint8 [out, in / 2], `scales` uint8 [out, in / 32]: see `mxfp4_numbers`.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.out_features = values.shape[0]
        self._values = values
        self._scales = scales

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out], in the dtype of x."""
        return F.linear(x, mxfp4_numbers(self._values, self._scales).to(x.dtype), bias)
