"""Whether a model can draft tokens as the configuration asks, and the layers that it then has.

It owns these checks; it must not load anything.
"""

from __future__ import annotations

from dataclasses import replace

from longspan.config import Speculation
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig
from longspan.models.params import Shapes
from longspan.models.registry import Family, check_checkpoint

_OTHERWISE = "use --speculative prompt-lookup:4, or leave it out"


def with_draft_layers(how: Speculation | None, model: ModelConfig) -> ModelConfig:
    """The model with the layers that it drafts with. Raises `ConfigError` if it has none."""
    if how is None or not how.by_model:
        return model
    if not model.num_draft_layers:
        raise ConfigError(
            "speculative", f"{how.method}:{how.tokens}",
            f"{model.architecture} has no module for multi-token prediction (num_nextn_predict_layers is not in its "
            "config.json, or 0)", _OTHERWISE,
        )  # fmt: skip
    return replace(model, loaded_draft_layers=1)


def check_weights(family: Family, model: ModelConfig, checkpoint: Shapes) -> None:
    """Raise `WeightError` unless the checkpoint has the model's tensors.

    Raises `ConfigError` if it was saved without the layers that the model drafts with.
    """
    prefix = f"model.layers.{model.num_layers}."
    if model.loaded_draft_layers and not any(name.startswith(prefix) for name in checkpoint.names()):
        raise ConfigError(
            "speculative", "mtp", f"the checkpoint has no tensors {prefix}*, which are the module for multi-token "
            "prediction", f"use a checkpoint that has them, or {_OTHERWISE.removeprefix('use ')}",
        )  # fmt: skip
    check_checkpoint(family, model, checkpoint)
