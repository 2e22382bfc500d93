"""Llama 2 and 3, SmolLM2 and Mistral: grouped-query attention with rope, SwiGLU, optional biases; windows in Mistral.

It owns the reading of their configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config, read_windows
from longspan.models.fields import Fields

_MISTRAL = "MistralForCausalLM"
_MISTRAL_WINDOW = 4096
ARCHITECTURES = ("LlamaForCausalLM", _MISTRAL)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. Llama's `attention_bias` includes the output projection."""
    fields = Fields(values)
    windows = read_windows(fields, _MISTRAL_WINDOW) if architecture == _MISTRAL else ()
    bias = fields.flag("attention_bias", False)
    return read_config(
        values, architecture,
        attention_bias=bias, attention_output_bias=bias, mlp_bias=fields.flag("mlp_bias", False),
        windows=windows,
    )  # fmt: skip
