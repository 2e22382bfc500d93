"""Which file knows an architecture.

It owns the table from names to families; adding a family is one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from longspan.errors import UnsupportedModel
from longspan.models import deepseek, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe
from longspan.models.config import ModelConfig
from longspan.models.context import Provided
from longspan.models.decoder import DecoderModel, decoder_params
from longspan.models.params import Shapes, validate_checkpoint

_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    name: family.parse
    for family in (llama, qwen2, qwen3, mixtral, qwen3_moe, deepseek, gpt_oss)
    for name in family.ARCHITECTURES
}


def architectures() -> tuple[str, ...]:
    """The names in a config.json that some family knows."""
    return tuple(_PARSERS)


def load_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model a Hugging Face style configuration describes; raises `UnsupportedModel` or `ModelError`."""
    names = values.get("architectures") or []
    for name in names:
        if name in _PARSERS:
            return _PARSERS[name](values, name)
    raise UnsupportedModel(
        f"architectures={list(names)} in config.json is not supported; supported are {', '.join(architectures())}"
    )


def check_checkpoint(config: ModelConfig, checkpoint: Shapes) -> None:
    """Raise `WeightError` unless the checkpoint is this model's."""
    first, stop = config.num_layers, config.num_layers + config.num_draft_layers
    unread = tuple(f"model.layers.{layer}." for layer in range(first, stop))
    validate_checkpoint(decoder_params(config), checkpoint, config.tie_word_embeddings, unread)


def build_model(config: ModelConfig, given: Provided, dtype: torch.dtype) -> DecoderModel:
    """The model on the slices its loader gives."""
    return DecoderModel(config, given, dtype)
