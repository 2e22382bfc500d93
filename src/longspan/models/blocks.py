"""Products with a weight that stays in the 4 or 8 bits of its file, computed in fp32 by the compiled kernels of a CPU.

It owns the product and the layout of its weight; it must not know file formats, nor which slice of a weight it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.compiled.blocks import QuantisedBlocks
from longspan.compiled.library import address, library
from longspan.models.ops.base import BlockPanels


class BlockLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out] in fp32 on a CPU, with a weight in blocks, by the compiled kernel.

    Codes, scales and offsets are stored in panels of adjacent outputs. A row's result does not depend on other rows.
    """

    def __init__(self, weight: QuantisedBlocks) -> None:
        self.out_features, self._depth = weight.codes.shape
        self._library = library()
        width = self._library.panel_width()
        count = -(-self.out_features // width)
        units = torch.empty(count, self._depth * weight.bits // 32, width, dtype=torch.int32)
        self._library.pack_blocks(
            weight.codes.contiguous().data_ptr(), units.data_ptr(), self.out_features, self._depth, weight.bits
        )
        scales = _in_panels(weight.scales, count, width)
        offsets = None if weight.offsets is None else _in_panels(weight.offsets, count, width)
        self.panels = BlockPanels(
            units, scales, offsets, self.out_features, self._depth, weight.bits, weight.block_width
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        x, rows, held = x.contiguous(), x.shape[0], self.panels
        out = x.new_empty(rows, self.out_features)
        self._library.product_blocks(
            address(x), *held.addresses, None if bias is None else address(bias), out.data_ptr(), rows,
            self.out_features, self._depth, held.bits, held.block_width,
        )  # fmt: skip
        return out


def _in_panels(values: Tensor, count: int, width: int) -> Tensor:
    """values [out, blocks] → [count, blocks, width], with zeros for outputs that there are not."""
    padded = values.new_zeros(count * width, values.shape[1])
    padded[: values.shape[0]] = values
    return padded.view(count, width, -1).transpose(1, 2).contiguous()
