"""Which family a model belongs to.

It owns the table of the families that are built in; adding one is one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from longspan.errors import UnsupportedModel
from longspan.models import deepseek, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe
from longspan.models.config import ModelConfig
from longspan.models.context import LayerContext, Model
from longspan.models.decoder import DecoderModel
from longspan.models.params import Param, Shapes, validate_checkpoint
from longspan.models.shapes import asked_by

BuildModel = Callable[[ModelConfig, LayerContext, torch.dtype], Model]


@dataclass(frozen=True)
class Family:
    """Models that are read and built alike."""

    architectures: tuple[str, ...]  # their names in a config.json
    parse: Callable[[Mapping[str, Any], str], ModelConfig]  # from a config.json and the name in it
    build: BuildModel = DecoderModel  # on the slices that a loader gives

    def params(self, config: ModelConfig) -> list[Param]:
        """Every parameter of a model, without any being loaded."""
        return asked_by(lambda context: self.build(config, context, torch.float32)).params


def family_of(module: ModuleType | Family) -> Family:
    """A file's `ARCHITECTURES` and `parse`, and its `build` where its layers are not those of `DecoderModel`."""
    if isinstance(module, Family):
        return module
    return Family(module.ARCHITECTURES, module.parse, getattr(module, "build", DecoderModel))


BUILT_IN = tuple(family_of(file) for file in (llama, qwen2, qwen3, mixtral, qwen3_moe, deepseek, gpt_oss))


def architectures(families: Sequence[Family] = BUILT_IN) -> tuple[str, ...]:
    """The names in a config.json that some family knows."""
    return tuple(name for family in families for name in family.architectures)


def find_family(values: Mapping[str, Any], families: Sequence[Family] = BUILT_IN) -> tuple[Family, ModelConfig]:
    """The first family that knows a Hugging Face style configuration, and the model this describes.

    Raises `UnsupportedModel` or `ModelError`.
    """
    names = values.get("architectures") or []
    for name in names:
        for family in families:
            if name in family.architectures:
                return family, family.parse(values, name)
    raise UnsupportedModel(
        f"architectures={list(names)} in config.json is not supported; "
        f"supported are {', '.join(architectures(families))}"
    )


def load_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model a configuration describes, of a family that is built in."""
    return find_family(values)[1]


def check_checkpoint(family: Family, config: ModelConfig, checkpoint: Shapes) -> None:
    """Raise `WeightError` unless the checkpoint is this model's."""
    first, stop = config.num_layers, config.num_layers + config.num_draft_layers
    unread = tuple(f"model.layers.{layer}." for layer in range(first, stop))
    validate_checkpoint(family.params(config), checkpoint, config.tie_word_embeddings, unread)
