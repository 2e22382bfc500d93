"""The gated feed-forward layer (SwiGLU, Shazeer 2020).

It owns the layer's three projections; it must not know which slice of the width it holds.
"""

from __future__ import annotations

from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import GatedLinear, LayerContext
from longspan.models.layers import PartialSum
from longspan.models.params import Param


class GatedMLP:
    """down(silu(gate(x)) · up(x)), on the slice of the width that its loader gives."""

    def __init__(self, config: ModelConfig, prefix: str, context: LayerContext) -> None:
        load, linear = context.loader.load, context.loader.linear
        hidden, wide = config.hidden_size, config.intermediate_size
        inner = [f"{prefix}.{name}_proj" for name in ("gate", "up")]
        self._tp = context.tp
        self._ops = context.ops
        self._gate_up = linear(*(Param(f"{name}.weight", (wide, hidden), ("ffn", None)) for name in inner))
        self._down = linear(Param(f"{prefix}.down_proj.weight", (hidden, wide), (None, "ffn")))
        self._gate_up_bias: Tensor | None = None
        self._down_bias: Tensor | None = None
        if config.mlp_bias:
            self._gate_up_bias = load(*(Param(f"{name}.bias", (wide,), ("ffn",)) for name in inner))
            self._down_bias = load(Param(f"{prefix}.down_proj.bias", (hidden,), (None,)))
        self._gated: GatedLinear | None = None
        if isinstance(self._gate_up, GatedLinear) and self._gate_up_bias is None:
            self._gated = self._gate_up

    def __call__(self, x: Tensor) -> PartialSum:
        """x [T, hidden] → [T, hidden]."""
        return PartialSum(self._tp, self._down(self._inner(x)), self._down_bias)

    def _inner(self, x: Tensor) -> Tensor:
        """x [T, hidden] → silu(gate(x)) · up(x) [T, width]."""
        found = None if self._gated is None else self._gated.swiglu(x)
        return self._ops.swiglu(self._gate_up(x, self._gate_up_bias)) if found is None else found
