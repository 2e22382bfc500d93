"""Qwen3: Llama's layers with a norm on each head of q and k.

It owns what their configuration files leave unsaid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config

ARCHITECTURES = ("Qwen3ForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str, **differences: Any) -> ModelConfig:
    """The configuration; windowed attention is off unless the file turns it on."""
    values = {"use_sliding_window": False, **values}
    bias = bool(values.get("attention_bias", False))
    return read_config(
        values, architecture, qk_norm=True, attention_bias=bias, attention_output_bias=bias, **differences
    )
