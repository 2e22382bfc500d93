"""The table of model families, and how a config.json is matched with one.

It owns the table of built-in families. To add one, add a file and a row to `BUILT_IN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from longspan.errors import UnsupportedModel
from longspan.models import deepseek, glm4_moe, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe
from longspan.models.config import ModelConfig
from longspan.models.context import LayerContext, Model
from longspan.models.decoder import DecoderModel
from longspan.models.fields import Fields, shown
from longspan.models.params import Param, Shapes, validate_checkpoint
from longspan.models.shapes import requests_of

BuildModel = Callable[[ModelConfig, LayerContext, torch.dtype], Model]


@dataclass(frozen=True)
class Family:
    """Models that share a configuration format and an implementation."""

    # names in a config.json
    architectures: tuple[str, ...]
    # (config.json as a mapping, architecture) → configuration
    parse: Callable[[Mapping[str, Any], str], ModelConfig]
    # (configuration, what layers are built from, dtype) → model
    build: BuildModel = DecoderModel

    def params(self, config: ModelConfig) -> list[Param]:
        """All parameters of a model. Nothing is loaded."""
        return requests_of(lambda context: self.build(config, context, torch.float32)).params


def family_of(module: ModuleType | Family) -> Family:
    """The family that a module describes by `ARCHITECTURES`, `parse` and, if not `DecoderModel`'s, `build`."""
    if isinstance(module, Family):
        return module
    return Family(module.ARCHITECTURES, module.parse, getattr(module, "build", DecoderModel))


_FILES = (llama, qwen2, qwen3, mixtral, qwen3_moe, deepseek, gpt_oss, glm4_moe)
BUILT_IN = tuple(family_of(file) for file in _FILES)


def architectures(families: Sequence[Family] = BUILT_IN) -> tuple[str, ...]:
    """All architectures of these families."""
    return tuple(name for family in families for name in family.architectures)


def find_family(values: Mapping[str, Any], families: Sequence[Family] = BUILT_IN) -> tuple[Family, ModelConfig]:
    """The first family that has an architecture of this config.json, and the parsed configuration.

    Where it names no architectures, its `model_type` decides. Raises `UnsupportedModel` if no family has it, and
    `ModelError` if a field is wrong.
    """
    named, kind = values.get("architectures") or [], values.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise Fields(values).wrong("architectures", named, "must be a list of names")
    for name in named or architectures(families):
        for family in families:
            if name in family.architectures and (named or _is_of_type(name, kind)):
                return family, family.parse(values, name)
    problem = f"architectures={shown(named)} in config.json is not supported"
    if not named:
        problem = f"config.json names no architectures, and model_type={shown(kind).strip(chr(39))} is not supported"
    raise UnsupportedModel(f"{problem}; supported are {', '.join(architectures(families))}")


def _is_of_type(architecture: str, model_type: object) -> bool:
    """Whether a name is that of the language model of a type: LlamaForCausalLM is of llama."""
    return architecture.lower() == f"{model_type}".replace("_", "").lower() + "forcausallm"


def load_config(values: Mapping[str, Any]) -> ModelConfig:
    """The parsed config.json of a built-in family. Raises as `find_family` does."""
    return find_family(values)[1]


def check_checkpoint(family: Family, config: ModelConfig, checkpoint: Shapes) -> None:
    """Raise `WeightError` unless the checkpoint has exactly the tensors of this model."""
    first, stop = config.num_layers, config.num_layers + config.num_draft_layers
    unread = tuple(f"model.layers.{layer}." for layer in range(first, stop))
    validate_checkpoint(family.params(config), checkpoint, config.tie_word_embeddings, unread)
