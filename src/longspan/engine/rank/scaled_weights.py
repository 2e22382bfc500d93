"""The decision whether a checkpoint's FP8 weights are kept in FP8, and which kernel multiplies them.

It owns this decision and its reason; it must not load weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.config import require
from longspan.models.scaled import BLOCK, problem_of_kernel
from longspan.weights.safetensors import SafetensorsCheckpoint


@dataclass(frozen=True)
class ScaledWeights:
    """FP8 weights that are kept in FP8."""

    # the files that hold them
    checkpoint: SafetensorsCheckpoint
    # whether PyTorch's `scaled_mm` multiplies them; if not, they are dequantised for each product
    fused: bool


@dataclass(frozen=True)
class ScaledChoice:
    """The decision of `choose_scaled`."""

    # None: dequantise at load, or the checkpoint has no FP8
    weights: ScaledWeights | None = None
    # why; empty if the checkpoint has no FP8
    reason: str = ""

    @property
    def notes(self) -> list[str]:
        """Lines printed at start."""
        return [f"FP8 weights: {self.reason}"] if self.reason else []


def choose_scaled(quantization: str, stored: SafetensorsCheckpoint | None, device: torch.device) -> ScaledChoice:
    """Decide whether FP8 weights are kept.

    `stored` is the checkpoint if its weights are in block-scaled FP8, else None. `quantization` is `auto` to keep FP8
    where PyTorch can multiply it, `fp8` to keep it on any device, or `none`; the others are as `auto`, since they are
    about weights on a CPU. Raises `ConfigError` for `fp8` if the
    checkpoint has no such weights.
    """
    require(
        quantization != "fp8" or stored is not None, "quantization", quantization,
        "the checkpoint's weights are not in block-scaled FP8", "leave it out, or take the model's FP8 checkpoint",
    )  # fmt: skip
    if stored is None:
        return ScaledChoice()
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
