"""The gated feed-forward layer (SwiGLU, Shazeer 2020).

It owns its three projections; it must not know how wide its slice is.
"""

from __future__ import annotations

from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import Provided
from longspan.models.experts import swiglu
from longspan.models.params import Param


def mlp_params(config: ModelConfig, prefix: str) -> dict[str, Param]:
    """The layer's parameters by role."""
    hidden, wide = config.hidden_size, config.intermediate_size
    params = {
        "gate": Param(f"{prefix}.gate_proj.weight", (wide, hidden), ("ffn", None)),
        "up": Param(f"{prefix}.up_proj.weight", (wide, hidden), ("ffn", None)),
        "down": Param(f"{prefix}.down_proj.weight", (hidden, wide), (None, "ffn")),
    }
    if config.mlp_bias:
        params["gate_bias"] = Param(f"{prefix}.gate_proj.bias", (wide,), ("ffn",))
        params["up_bias"] = Param(f"{prefix}.up_proj.bias", (wide,), ("ffn",))
        params["down_bias"] = Param(f"{prefix}.down_proj.bias", (hidden,), (None,))
    return params


class GatedMLP:
    """down(silu(gate(x)) · up(x)) on the part of the width its loader gives."""

    def __init__(self, config: ModelConfig, prefix: str, given: Provided) -> None:
        params = mlp_params(config, prefix)
        self._tp = given.tp
        self._gate_up = given.loader.linear(params["gate"], params["up"])
        self._down = given.loader.linear(params["down"])
        self._gate_up_bias = given.loader.load(params["gate_bias"], params["up_bias"]) if config.mlp_bias else None
        self._down_bias = given.loader.load(params["down_bias"]) if config.mlp_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden], summed over the TP group."""
        summed = self._tp.all_reduce(self._down(swiglu(self._gate_up(x, self._gate_up_bias))))
        return summed if self._down_bias is None else summed + self._down_bias
