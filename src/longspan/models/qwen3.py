"""Qwen3: Llama's layers with a norm on each head of q and k.

It owns the defaults of their configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config
from longspan.models.fields import Fields
from longspan.models.qwen2 import optional_windows

ARCHITECTURES = ("Qwen3ForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str, **differences: Any) -> ModelConfig:
    """The configuration. Layers have windows only if the file switches them on. `differences` replace its fields."""
    windows = optional_windows(values)
    bias = Fields(values).flag("attention_bias", False)
    common = {"qk_norm": True, "attention_bias": bias, "attention_output_bias": bias, "windows": windows}
    return read_config(values, architecture, **{**common, **differences})
