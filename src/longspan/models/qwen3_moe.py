"""Qwen3-MoE: Qwen3's attention with a mixture of experts in most layers.

It owns what their configuration files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models import qwen3
from longspan.models.config import Fields, ModelConfig, MoEConfig
from longspan.models.qwen2 import optional_windows

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration; layers named in `mlp_only_layers`, or off the `decoder_sparse_step`, are dense.

    Unlike in Qwen3 a window is every layer's, whatever `max_window_layers` says.
    """
    fields = Fields(values)
    step, dense = fields.size("decoder_sparse_step", 1), set(fields.get("mlp_only_layers", ()))
    layers = range(fields.size("num_hidden_layers"))
    moe = MoEConfig(
        num_experts=fields.size("num_experts", fields.get("num_local_experts")),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("moe_intermediate_size"),
        layers=frozenset(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense),
        normalise=bool(fields.get("norm_topk_prob", False)),
    )
    windows = optional_windows({**values, "max_window_layers": 0})
    return qwen3.parse(values, architecture, moe=moe, windows=windows)
