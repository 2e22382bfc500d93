"""Qwen3-MoE: Qwen3's attention with a mixture of experts in most layers.

It owns the reading of their configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models import qwen3
from longspan.models.config import ModelConfig, MoEConfig
from longspan.models.fields import MAX_LAYERS, Fields
from longspan.models.qwen2 import optional_windows

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. Every `decoder_sparse_step`-th layer has a mixture, unless it is in `mlp_only_layers`.

    Unlike in Qwen3, all layers have the window if it is switched on: `max_window_layers` is ignored.
    """
    fields = Fields(values)
    step, dense = fields.size("decoder_sparse_step", 1), set(fields.counts("mlp_only_layers"))
    layers = range(fields.size("num_hidden_layers", most=MAX_LAYERS))
    moe = MoEConfig(
        num_experts=fields.size("num_experts", fields.get("num_local_experts")),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("moe_intermediate_size"),
        layers=frozenset(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense),
        normalise=fields.flag("norm_topk_prob", False),
    )
    windows = optional_windows({**values, "max_window_layers": 0})
    return qwen3.parse(values, architecture, moe=moe, windows=windows)
