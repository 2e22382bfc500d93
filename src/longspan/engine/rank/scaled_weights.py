"""Whether a checkpoint's FP8 weights stay as they are, and with which product.

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
    """FP8 weights to be kept: the files that hold them, and whether PyTorch's own product is used."""

    checkpoint: SafetensorsCheckpoint
    fused: bool


@dataclass(frozen=True)
class ScaledChoice:
    """What was decided, None to dequantise at load, and why; no reason where the checkpoint has no FP8."""

    weights: ScaledWeights | None = None
    reason: str = ""

    @property
    def notes(self) -> list[str]:
        """For the user, at start."""
        return [f"FP8 weights: {self.reason}"] if self.reason else []


def choose_scaled(quantization: str, stored: SafetensorsCheckpoint | None, device: torch.device) -> ScaledChoice:
    """`stored` is the checkpoint if its weights are in block-scaled FP8. Raises `ConfigError` for `fp8` where not.

    `auto` keeps FP8 where PyTorch multiplies it as it is, `fp8` keeps it everywhere, `none` nowhere.
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
    if quantization == "auto":
        return ScaledChoice(reason=f"dequantised at load ({problem})")
    return ScaledChoice(ScaledWeights(stored, fused=False), f"kept, dequantised for each product ({problem})")
