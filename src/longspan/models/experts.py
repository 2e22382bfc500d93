"""One expert of a mixture: its tensors, and what it computes.

It owns the two ways in which checkpoints hold experts; it must not know which rows come to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models.config import MoEConfig
from longspan.models.context import Linear, Loader
from longspan.models.params import Param

_SWISH_SLOPE = 1.702  # of gpt-oss's gate


@dataclass(frozen=True)
class ExpertParams:
    """gate and up [2 · intermediate, hidden] from one tensor or two, down [hidden, intermediate], biases if any."""

    gate_up: tuple[Param, ...]
    down: Param
    gate_up_bias: Param | None = None
    down_bias: Param | None = None

    @property
    def all(self) -> list[Param]:
        """Every parameter."""
        return [*self.gate_up, self.down, *(bias for bias in (self.gate_up_bias, self.down_bias) if bias)]


def expert_params(moe: MoEConfig, hidden: int, prefix: str, expert: int) -> ExpertParams:
    """The tensors of an expert: its own, or its part of those that hold all experts."""
    if moe.stacked:
        return _stacked(moe, hidden, f"{prefix}.experts", expert)
    gate, up, down = moe.names
    return _separate(hidden, moe.intermediate_size, f"{prefix}.experts.{expert}", (gate, up, down), None)


def shared_params(moe: MoEConfig, hidden: int, prefix: str) -> ExpertParams:
    """The tensors of the expert that every row goes through."""
    names = ("gate_proj", "up_proj", "down_proj")
    return _separate(hidden, moe.shared_intermediate_size, f"{prefix}.shared_experts", names, "shared_ffn")


def _separate(hidden: int, wide: int, name: str, names: tuple[str, str, str], axis: str | None) -> ExpertParams:
    gate, up, down = names
    return ExpertParams(
        (
            Param(f"{name}.{gate}.weight", (wide, hidden), (axis, None)),
            Param(f"{name}.{up}.weight", (wide, hidden), (axis, None)),
        ),
        Param(f"{name}.{down}.weight", (hidden, wide), (None, axis)),
    )


def _stacked(moe: MoEConfig, hidden: int, name: str, expert: int) -> ExpertParams:
    count, wide = moe.num_experts, moe.intermediate_size
    return ExpertParams(
        (Param(f"{name}.gate_up_proj", (count, hidden, 2 * wide), (None, None, None), stacked=expert),),
        Param(f"{name}.down_proj", (count, wide, hidden), (None, None, None), stacked=expert),
        Param(f"{name}.gate_up_proj_bias", (count, 2 * wide), (None, None), stacked=expert),
        Param(f"{name}.down_proj_bias", (count, hidden), (None, None), stacked=expert),
    )


class Expert:
    """down(activation(gate(x), up(x)))."""

    def __init__(self, params: ExpertParams, loader: Loader, limit: float | None = None) -> None:
        self._gate_up: Linear = loader.linear(*params.gate_up)
        self._down: Linear = loader.linear(params.down)
        self._gate_up_bias = loader.load(params.gate_up_bias) if params.gate_up_bias else None
        self._down_bias = loader.load(params.down_bias) if params.down_bias else None
        self._limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        """[R, hidden] → [R, hidden]."""
        gate_up = self._gate_up(x, self._gate_up_bias)
        inner = swiglu(gate_up) if self._limit is None else clamped_swiglu(gate_up, self._limit)
        return self._down(inner, self._down_bias)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [R, gate | up] (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gpt-oss: both clamped, gate · sigmoid(1.702 · gate) · (up + 1); gate and up are interleaved."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(_SWISH_SLOPE * gate) * (up + 1)
