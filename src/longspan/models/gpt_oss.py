"""gpt-oss: alternating windowed and full layers, a sink for each head, experts in stacked tensors.

It owns the reading of their configuration files, and parameter names that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, MoEConfig, read_config, read_windows
from longspan.models.fields import MAX_LAYERS, Fields

_WINDOW = 128
ARCHITECTURES = ("GptOssForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. Without `layer_types` layers 0, 2, 4 ... have a window."""
    fields = Fields(values)
    layers = range(fields.size("num_hidden_layers", most=MAX_LAYERS))
    types = fields.get("layer_types") or [("sliding_attention", "full_attention")[layer % 2] for layer in layers]
    bias = fields.flag("attention_bias", True)
    moe = MoEConfig(
        num_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("intermediate_size"),
        layers=frozenset(layers),
        scoring="softmax_of_chosen",
        router="router",
        router_bias=True,
        stacked=True,
        swiglu_limit=fields.number("swiglu_limit", 7.0),
    )
    return read_config(
        values,
        architecture,
        moe=moe,
        attention_sinks=True,
        windows=read_windows(Fields({**values, "layer_types": types}), _WINDOW),
        attention_bias=bias,
        attention_output_bias=bias,
    )
