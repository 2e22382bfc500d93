"""The same weights in Hugging Face transformers, as a reference to compare with.

It owns the conversion only; the engine does not use it.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from longspan.weights.source import ModelSource


def transformers_reference(source: ModelSource, dtype: torch.dtype) -> Any:
    """A transformers causal language model on the source's weights, dequantised to `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM  # importing takes seconds

    if source.path.is_dir():
        return AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).eval()
    values = {key: value for key, value in source.config.items() if value is not None and key != "model_type"}
    config = AutoConfig.for_model(source.config["model_type"], **values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            whole = tuple(slice(0, size) for size in parameter.shape)
            source.checkpoint.read(name, whole, parameter)
    return model


def cache_name(model: Any) -> str:
    """The name of a transformers model's KV cache, as an argument and in its results: newer versions have another."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
