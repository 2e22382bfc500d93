"""The arithmetic of a norm over a row, in Triton, for all kernels that have a norm in them.

A sum over a TP group with its norm must give the bits of the two apart, so both take them from here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalised(values, factor, eps, kind, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm of `values` fp32 [BLOCK], which are 0 behind WIDTH, times `factor` fp32 [BLOCK], in the dtype `kind`.

    Rounded before and after the factor, as plain operations round.
    """
    scale = tl.rsqrt(tl.div_rn(tl.sum(values * values, axis=0), WIDTH * 1.0) + eps)
    return ((values * scale).to(kind).to(tl.float32) * factor).to(kind)
