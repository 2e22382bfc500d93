"""One expert of a mixture: its weights, and its computation.

It owns the two ways in which checkpoints store experts; it must not know which rows are routed to an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.models.config import MoEConfig
from longspan.models.context import Linear, Loader
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

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        gate_up = self.gate_up(x, self.gate_up_bias)
        inner = _PLAIN.swiglu(gate_up) if self.limit is None else _PLAIN.clamped_swiglu(gate_up, self.limit)
        return self.down(inner, self.down_bias)


def routed_expert(moe: MoEConfig, hidden: int, prefix: str, loader: Loader, expert: int) -> Expert:
    """Expert number `expert`, from tensors of its own or from its entry in stacked tensors."""
    if moe.stacked:
        return _stacked(moe, hidden, f"{prefix}.experts", expert, loader)
    return _separate(hidden, moe.intermediate_size, f"{prefix}.experts.{expert}", moe.names, None, loader)


def shared_expert(moe: MoEConfig, hidden: int, prefix: str, loader: Loader) -> Expert:
    """The expert that computes every row, split by width over the TP group."""
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
