"""The best rates of a device, measured: a large copy and a large matrix product.

It owns their sizes. Results of kernels are shown as shares of these rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.clock import Clock

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 768}


@dataclass(frozen=True)
class Ceilings:
    """The best rates of one device."""

    copy: float  # bytes per second, read and written
    matmul: float  # floating-point operations per second


def measure_ceilings(clock: Clock, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both rates; the product is in `dtype`."""
    source = torch.randint(0, 255, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = clock.time(lambda: target.copy_(source)).median
    size = _MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    matmul = clock.time(lambda: torch.mm(a, b, out=product)).median
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / matmul)
