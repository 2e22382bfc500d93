"""Weights in MXFP4 (OCP Microscaling 1.0), and the numbers that they stand for.

It owns the format; it must not know where such weights come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # adjacent values of a row that share a scale
_BIAS = 127  # exponent bias of a scale
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4_numbers(packed: Tensor, scales: Tensor) -> Tensor:
    """Values uint8 [..., n / 2] and scales uint8 [..., n / 32] → fp32 [..., n].

    A byte holds two values, the low half first. A scale is the exponent of a power of two.
    """
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    blocks = torch.tensor(_VALUES, device=packed.device)[halves].view(*scales.shape, BLOCK)
    return torch.ldexp(blocks, scales[..., None].int() - _BIAS).flatten(-2)
