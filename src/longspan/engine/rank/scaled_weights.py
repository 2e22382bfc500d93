"""The decision whether a checkpoint's FP8 or MXFP4 weights are kept so, and which kernel multiplies them.

It owns this decision and its reason; it must not load weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.config import require
from longspan.models.grouped import problem_of_kernels
from longspan.models.scaled import BLOCK, problem_of_kernel
from longspan.weights.mxfp4 import Mxfp4Checkpoint
from longspan.weights.safetensors import SafetensorsCheckpoint
from longspan.weights.source import ModelSource


@dataclass(frozen=True)
class ScaledWeights:
    """FP8 weights that are kept in FP8."""

    # the files that hold them
    checkpoint: SafetensorsCheckpoint
    # whether PyTorch's `scaled_mm` multiplies them; if not, they are dequantised for each product
    fused: bool


@dataclass(frozen=True)
class ScaledChoice:
    """The decision of `choose_scaled`. Where neither is kept, weights are dequantised at load, if they need be."""

    # FP8 weights that are kept
    weights: ScaledWeights | None = None
    # why; empty if the checkpoint has no such weights
    reason: str = ""
    # MXFP4 weights that are kept
    packed: Mxfp4Checkpoint | None = None
    # of the checkpoint's weights
    format: str = "FP8"

    @property
    def keeps(self) -> bool:
        """Whether weights are held in the checkpoint's format."""
        return self.weights is not None or self.packed is not None

    @property
    def notes(self) -> list[str]:
        """Lines printed at start."""
        return [f"{self.format} weights: {self.reason}"] if self.reason else []


def choose_scaled(quantization: str, source: ModelSource, device: torch.device, dtype: torch.dtype) -> ScaledChoice:
    """Decide whether FP8 or MXFP4 weights are kept. `dtype` is that of activations.

    `quantization` is `auto` to keep them where they can be multiplied, `fp8` to keep FP8 on any device, or `none`; the
    others are as `auto`, since they are about weights on a CPU. Raises `ConfigError` for `fp8` if the checkpoint has no
    such weights.
    """
    stored = source.block_scaled
    require(
        quantization != "fp8" or stored is not None, "quantization", quantization,
        "the checkpoint's weights are not in block-scaled FP8", "leave it out, or take the model's FP8 checkpoint",
    )  # fmt: skip
    if isinstance(source.checkpoint, Mxfp4Checkpoint):
        problem = "--quantization none" if quantization == "none" else problem_of_kernels(device, dtype)
        if problem is not None:
            return ScaledChoice(reason=f"dequantised at load ({problem})", format="MXFP4")
        return ScaledChoice(reason="kept", packed=source.checkpoint, format="MXFP4")
    return ScaledChoice() if stored is None else _choose_fp8(quantization, stored, device)


def _choose_fp8(quantization: str, stored: SafetensorsCheckpoint, device: torch.device) -> ScaledChoice:
    blocks = stored.scale_block
    require(
        quantization != "fp8" or blocks == (BLOCK, BLOCK), "quantization", quantization,
        f"weights in blocks of {blocks[0]}x{blocks[1]} cannot be multiplied as they are", "use --quantization none",
    )  # fmt: skip
    if quantization == "none" or blocks != (BLOCK, BLOCK):
        return ScaledChoice(reason="dequantised at load")
    problem = problem_of_kernel(device)
    if problem is None:
        return ScaledChoice(ScaledWeights(stored, fused=True), "kept, multiplied by PyTorch's scaled_mm")
    if quantization != "fp8":
        return ScaledChoice(reason=f"dequantised at load ({problem})")
    return ScaledChoice(ScaledWeights(stored, fused=False), f"kept, dequantised for each product ({problem})")
