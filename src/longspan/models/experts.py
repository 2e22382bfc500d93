"""The experts of a mixture: their weights, and the computation of one.

It owns the two ways in which checkpoints store experts; it must not know which rows are routed to an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.models.config import MoEConfig
from longspan.models.context import Linear, LinearStack, Loader
from longspan.models.mlp import swiglu
from longspan.models.params import Param

_SWISH_SLOPE = 1.702  # in the gate of gpt-oss


@dataclass(frozen=True)
class Expert:
    """down(activation(gate(x), up(x)))."""

    # hidden → gate and up
    gate_up: Linear
    # intermediate → hidden
    down: Linear
    # [gate and up]
    gate_up_bias: Tensor | None = None
    # [hidden]
    down_bias: Tensor | None = None
    # limit of gpt-oss's clamped activation; None for SwiGLU
    limit: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        return self.down(activate(self.gate_up(x, self.gate_up_bias), self.limit), self.down_bias)


@dataclass(frozen=True)
class RoutedExperts:
    """Adjacent experts of a layer: those that a rank holds. E is their number."""

    # number of the first expert
    first: int
    # experts of the layer, here and on other ranks
    total: int
    # hidden → gate and up, of each expert
    gate_up: LinearStack
    # intermediate → hidden, of each expert
    down: LinearStack
    # [E, gate and up]
    gate_up_bias: Tensor | None = None
    # [E, hidden]
    down_bias: Tensor | None = None
    # limit of gpt-oss's clamped activation; None for SwiGLU
    limit: float | None = None

    def __len__(self) -> int:
        return len(self.gate_up.linears)

    def expert(self, number: int) -> Expert:
        """The expert of this number, which must be held."""
        place = number - self.first
        return Expert(
            self.gate_up.linears[place],
            self.down.linears[place],
            None if self.gate_up_bias is None else self.gate_up_bias[place],
            None if self.down_bias is None else self.down_bias[place],
            self.limit,
        )


def routed_experts(moe: MoEConfig, hidden: int, prefix: str, loader: Loader, experts: range) -> RoutedExperts:
    """The experts of these numbers, from tensors of their own or from their entries in stacked tensors."""
    stacks = _stacked if moe.stacked else _separate
    return stacks(moe, hidden, f"{prefix}.experts", experts, loader)


def shared_expert(moe: MoEConfig, hidden: int, prefix: str, loader: Loader) -> Expert:
    """The expert that computes every row, split by width over the TP group."""
    names = ("gate_proj", "up_proj", "down_proj")
    inner, outer = _projections(hidden, moe.shared_intermediate_size, f"{prefix}.shared_experts", names, "shared_ffn")
    return Expert(loader.linear(*inner), loader.linear(*outer))


def _projections(
    hidden: int, wide: int, name: str, names: tuple[str, str, str], axis: str | None
) -> tuple[Sequence[Param], Sequence[Param]]:
    """The parameters of an expert with tensors of its own: gate and up, and down."""
    gate, up, down = (f"{name}.{role}.weight" for role in names)
    inner, axes = (wide, hidden), (axis, None)
    return (Param(gate, inner, axes), Param(up, inner, axes)), (Param(down, (hidden, wide), (None, axis)),)


def _separate(moe: MoEConfig, hidden: int, name: str, experts: range, loader: Loader) -> RoutedExperts:
    found = [_projections(hidden, moe.intermediate_size, f"{name}.{each}", moe.names, None) for each in experts]
    return RoutedExperts(
        experts.start,
        moe.num_experts,
        loader.linear_stack(*(inner for inner, _ in found)),
        loader.linear_stack(*(outer for _, outer in found)),
    )


def _stacked(moe: MoEConfig, hidden: int, name: str, experts: range, loader: Loader) -> RoutedExperts:
    def entries(role: str, *shape: int) -> list[Param]:
        whole, axes = (moe.num_experts, *shape), (None,) * (1 + len(shape))
        return [Param(f"{name}.{role}", whole, axes, stacked=each) for each in experts]

    def biases(role: str, width: int) -> Tensor | None:
        return loader.load(*entries(role, width)).view(len(experts), width) if experts else None

    wide = moe.intermediate_size
    return RoutedExperts(
        experts.start,
        moe.num_experts,
        loader.linear_stack(*([each] for each in entries("gate_up_proj", hidden, 2 * wide))),
        loader.linear_stack(*([each] for each in entries("down_proj", wide, hidden))),
        biases("gate_up_proj_bias", 2 * wide),
        biases("down_proj_bias", hidden),
        moe.swiglu_limit,
    )


def activate(gate_up: Tensor, limit: float | None) -> Tensor:
    """gate_up [T, 2 · width] → [T, width], by SwiGLU or, with a limit, by gpt-oss's clamped activation."""
    return swiglu(gate_up) if limit is None else clamped_swiglu(gate_up, limit)


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gate_up [T, 2 · width], gate and up interleaved → gate · sigmoid(1.702 · gate) · (up + 1) [T, width] (gpt-oss).

    Before that gate is clamped to at most `limit`, and up to [-limit, limit].
    """
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(_SWISH_SLOPE * gate) * (up + 1)
