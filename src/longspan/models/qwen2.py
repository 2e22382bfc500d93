"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v.

It owns what their configuration files leave unsaid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config

ARCHITECTURES = ("Qwen2ForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration; windowed attention is off unless the file turns it on."""
    values = {"use_sliding_window": False, **values}
    return read_config(values, architecture, attention_bias=True)
