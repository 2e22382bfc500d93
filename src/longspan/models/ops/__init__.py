"""The operations between a layer's matrix products, and their choice by device.

It owns the choice. An implementation for another kind of device is a file here and a line in `choose_ops`.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from longspan.models.ops.base import LayerOps, RopeTable
from longspan.models.ops.plain import PlainOps


def choose_ops(device: torch.device, compiled: bool = False) -> LayerOps:
    """Triton's kernels on a GPU, if Triton is installed; on a CPU compiled ones if asked for; else PyTorch's."""
    if device.type == "cuda" and find_spec("triton"):
        from longspan.models.ops.triton import TritonOps

        return TritonOps()
    if compiled:
        from longspan.models.ops.compiled import CompiledOps

        return CompiledOps()
    return PlainOps()


__all__ = ["LayerOps", "PlainOps", "RopeTable", "choose_ops"]
