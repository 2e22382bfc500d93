"""Weights in 4 or 8 bits, of which adjacent elements share a scale and an offset, as compiled kernels take them.

It owns this form; it must not know file formats, nor how the kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 32  # columns with one scale, where nothing else is said


@dataclass(frozen=True)
class QuantisedBlocks:
    """A weight [out, in] in blocks of `block_width` adjacent elements of a row: element = scale · code + offset.

    Codes of 4 bits are 0 to 15 with offsets and -8 to 7 without, those of 8 bits -128 to 127.
    """

    # int8 [out, in]
    codes: Tensor
    # fp32 [out, in / block_width]
    scales: Tensor
    # fp32 [out, in / block_width]; None if all are 0
    offsets: Tensor | None
    # 4 or 8
    bits: int
    # columns of a block
    block_width: int

    def in_blocks_of(self, width: int) -> QuantisedBlocks:
        """The same weight in smaller blocks."""
        repeats = self.block_width // width
        offsets = None if self.offsets is None else self.offsets.repeat_interleave(repeats, 1)
        return replace(self, scales=self.scales.repeat_interleave(repeats, 1), offsets=offsets, block_width=width)

    def columns(self, wanted: slice) -> QuantisedBlocks:
        """The same rows of columns that begin and end between blocks."""
        blocks = slice(wanted.start // self.block_width, wanted.stop // self.block_width)
        offsets = None if self.offsets is None else self.offsets[:, blocks]
        return replace(self, codes=self.codes[:, wanted], scales=self.scales[:, blocks], offsets=offsets)

    def dequantised(self) -> Tensor:
        """The weight [out, in] in fp32."""
        blocks: Tensor = self.codes.float().view(*self.scales.shape, self.block_width) * self.scales[..., None]
        return (blocks if self.offsets is None else blocks + self.offsets[..., None]).flatten(1)


def joined(parts: Sequence[QuantisedBlocks]) -> QuantisedBlocks:
    """Weights one below the other, in a form that holds all of them exactly."""
    alike = [part.in_blocks_of(min(part.block_width for part in parts)) for part in parts]
    has_offsets = {part.offsets is not None for part in parts}
    offsets = None
    if True in has_offsets:
        offsets = torch.cat([torch.zeros_like(p.scales) if p.offsets is None else p.offsets for p in alike])
    return QuantisedBlocks(
        torch.cat([part.codes for part in alike]), torch.cat([part.scales for part in alike]), offsets,
        bits=max(part.bits for part in parts) if len(has_offsets) == 1 else 8, block_width=alike[0].block_width,
    )  # fmt: skip


def quantised(weight: Tensor, bits: int = 4, width: int = BLOCK) -> QuantisedBlocks:
    """A weight [out, in] rounded to codes with offsets, for what is measured or tried on any weight."""
    blocks = weight.float().unflatten(1, (-1, width))  # type: ignore[no-untyped-call]
    low, high = blocks.amin(2), blocks.amax(2)
    first, levels = 0 if bits == 4 else -(2 ** (bits - 1)), 2**bits - 1
    scales = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((blocks - low[..., None]) / scales[..., None]).round_().clamp_(0, levels) + first
    return QuantisedBlocks(codes.to(torch.int8).flatten(1), scales, low - first * scales, bits, width)
