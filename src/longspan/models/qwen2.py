"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v.

It owns the defaults of their configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, read_config, read_windows
from longspan.models.fields import Fields

_WINDOW, _FULL_LAYERS = 4096, 28
ARCHITECTURES = ("Qwen2ForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. Layers have windows only if the file switches them on."""
    return read_config(values, architecture, attention_bias=True, windows=optional_windows(values))


def optional_windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's rule for windows: with `use_sliding_window` layers from number `max_window_layers` on have one."""
    fields = Fields(values)
    if not fields.flag("use_sliding_window", False):
        return ()
    return read_windows(fields, _WINDOW, fields.count("max_window_layers", _FULL_LAYERS))
