"""The experts of a mixture: their weights, and the computation of one.

It owns the two ways in which checkpoints store experts; it must not know which rows are routed to an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from longspan.models.config import MoEConfig
from longspan.models.context import LayerContext, Linear, LinearStack
from longspan.models.ops.base import LayerOps
from longspan.models.ops.plain import PlainOps
from longspan.models.params import Param

_PLAIN: LayerOps = PlainOps()


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
    # computes the activation
    ops: LayerOps = field(default_factory=PlainOps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        return self.down(activate(self.gate_up(x, self.gate_up_bias), self.limit, self.ops), self.down_bias)


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
    # computes the activation, and sums the results of a row's experts
    ops: LayerOps = field(default_factory=PlainOps)

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
            self.ops,
        )


def routed_experts(moe: MoEConfig, hidden: int, prefix: str, context: LayerContext, experts: range) -> RoutedExperts:
    """The experts of these numbers, from tensors of their own or from their entries in stacked tensors."""
    stacks = _stacked if moe.stacked else _separate
    return stacks(moe, hidden, f"{prefix}.experts", experts, context)


def shared_expert(moe: MoEConfig, hidden: int, prefix: str, context: LayerContext) -> Expert:
    """The expert that computes every row, split by width over the TP group."""
    names = ("gate_proj", "up_proj", "down_proj")
    inner, outer = _projections(hidden, moe.shared_intermediate_size, f"{prefix}.shared_experts", names, "shared_ffn")
    linear = context.loader.linear
    return Expert(linear(*inner), linear(*outer), ops=context.ops)


def _projections(
    hidden: int, wide: int, name: str, names: tuple[str, str, str], axis: str | None
) -> tuple[Sequence[Param], Sequence[Param]]:
    """The parameters of an expert with tensors of its own: gate and up, and down."""
    gate, up, down = (f"{name}.{role}.weight" for role in names)
    inner, axes = (wide, hidden), (axis, None)
    return (Param(gate, inner, axes), Param(up, inner, axes)), (Param(down, (hidden, wide), (None, axis)),)


def _separate(moe: MoEConfig, hidden: int, name: str, experts: range, context: LayerContext) -> RoutedExperts:
    loader = context.loader
    found = [_projections(hidden, moe.intermediate_size, f"{name}.{each}", moe.names, None) for each in experts]
    return RoutedExperts(
        experts.start,
        moe.num_experts,
        loader.linear_stack(*(inner for inner, _ in found)),
        loader.linear_stack(*(outer for _, outer in found)),
        ops=context.ops,
    )


def _stacked(moe: MoEConfig, hidden: int, name: str, experts: range, context: LayerContext) -> RoutedExperts:
    def entries(role: str, *shape: int) -> list[Param]:
        whole, axes = (moe.num_experts, *shape), (None,) * (1 + len(shape))
        return [Param(f"{name}.{role}", whole, axes, stacked=each) for each in experts]

    def biases(role: str, width: int) -> Tensor | None:
        return context.loader.load(*entries(role, width)).view(len(experts), width) if experts else None

    loader, wide = context.loader, moe.intermediate_size
    return RoutedExperts(
        experts.start,
        moe.num_experts,
        loader.linear_stack(*([each] for each in entries("gate_up_proj", hidden, 2 * wide))),
        loader.linear_stack(*([each] for each in entries("down_proj", wide, hidden))),
        biases("gate_up_proj_bias", 2 * wide),
        biases("down_proj_bias", hidden),
        moe.swiglu_limit,
        context.ops,
    )


def activate(gate_up: Tensor, limit: float | None, ops: LayerOps) -> Tensor:
    """gate_up [T, 2 · width] → [T, width], by SwiGLU or, with a limit, by gpt-oss's clamped activation."""
    return ops.swiglu(gate_up) if limit is None else ops.clamped_swiglu(gate_up, limit)
