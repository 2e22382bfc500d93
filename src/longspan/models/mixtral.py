"""Mixtral: Llama's layers with a mixture of experts in place of every MLP.

It owns the reading of their configuration files, and parameter names that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, MoEConfig, read_config, read_windows
from longspan.models.fields import MAX_LAYERS, Fields

ARCHITECTURES = ("MixtralForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. Every layer has a mixture, with weights normalised over the chosen experts."""
    fields = Fields(values)
    moe = MoEConfig(
        num_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("intermediate_size"),
        layers=frozenset(range(fields.size("num_hidden_layers", most=MAX_LAYERS))),
        block="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )
    return read_config(values, architecture, moe=moe, windows=read_windows(fields, None))
