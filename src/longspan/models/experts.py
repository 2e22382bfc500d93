"""One expert of a mixture: its tensors, and what it computes.

It owns the two ways in which checkpoints hold experts; it must not know which rows come to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.models.config import MoEConfig
from longspan.models.context import Linear, Loader
from longspan.models.mlp import swiglu
from longspan.models.params import Param

_SWISH_SLOPE = 1.702  # of gpt-oss's gate


@dataclass(frozen=True)
class Expert:
    """down(activation(gate(x), up(x)))."""

    gate_up: Linear  # hidden → gate and up
    down: Linear
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    limit: float | None = None  # of gpt-oss's clamped activation

    def __call__(self, x: Tensor) -> Tensor:
        """[R, hidden] → [R, hidden]."""
        gate_up = self.gate_up(x, self.gate_up_bias)
        inner = swiglu(gate_up) if self.limit is None else clamped_swiglu(gate_up, self.limit)
        return self.down(inner, self.down_bias)


def routed_expert(moe: MoEConfig, hidden: int, prefix: str, loader: Loader, expert: int) -> Expert:
    """An expert from tensors of its own, or from its part of those that hold all experts."""
    if moe.stacked:
        return _stacked(moe, hidden, f"{prefix}.experts", expert, loader)
    return _separate(hidden, moe.intermediate_size, f"{prefix}.experts.{expert}", moe.names, None, loader)


def shared_expert(moe: MoEConfig, hidden: int, prefix: str, loader: Loader) -> Expert:
    """The expert that every row goes through."""
    names = ("gate_proj", "up_proj", "down_proj")
    return _separate(hidden, moe.shared_intermediate_size, f"{prefix}.shared_experts", names, "shared_ffn", loader)


def _separate(
    hidden: int, wide: int, name: str, names: tuple[str, str, str], axis: str | None, loader: Loader
) -> Expert:
    gate, up, down = names
    inner, axes = (wide, hidden), (axis, None)
    return Expert(
        loader.linear(Param(f"{name}.{gate}.weight", inner, axes), Param(f"{name}.{up}.weight", inner, axes)),
        loader.linear(Param(f"{name}.{down}.weight", (hidden, wide), (None, axis))),
    )


def _stacked(moe: MoEConfig, hidden: int, name: str, expert: int, loader: Loader) -> Expert:
    def entry(role: str, *shape: int) -> Param:
        return Param(f"{name}.{role}", (moe.num_experts, *shape), (None, *(None for _ in shape)), stacked=expert)

    wide = moe.intermediate_size
    return Expert(
        loader.linear(entry("gate_up_proj", hidden, 2 * wide)),
        loader.linear(entry("down_proj", wide, hidden)),
        loader.load(entry("gate_up_proj_bias", 2 * wide)),
        loader.load(entry("down_proj_bias", hidden)),
        moe.swiglu_limit,
    )


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gpt-oss: both clamped, gate · sigmoid(1.702 · gate) · (up + 1); gate and up are interleaved."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(_SWISH_SLOPE * gate) * (up + 1)
