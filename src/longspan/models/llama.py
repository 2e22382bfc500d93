"""Llama 2 and 3, SmolLM2, Mistral: rotary, grouped-query attention, SwiGLU, optional biases.

It owns what their configuration files say; the layers are the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration; Llama's `attention_bias` covers the output projection too."""
    bias = bool(values.get("attention_bias", False))
    return read_config(
        values, architecture,
        attention_bias=bias, attention_output_bias=bias, mlp_bias=bool(values.get("mlp_bias", False)),
    )  # fmt: skip
