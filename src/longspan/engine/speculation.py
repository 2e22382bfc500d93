"""Whether a model can draft tokens as the configuration asks, and the layers that it, or a checkpoint of its own, has.

It owns these checks; it must not load anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from longspan.config import EngineConfig, Speculation
from longspan.config.speculation import EAGLE3, MTP
from longspan.engine.draft_setup import DraftCheckpoint, Embed
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig
from longspan.models.context import DraftModule, LayerContext
from longspan.models.decoder import DecoderModel
from longspan.models.eagle3 import JOIN, MASK, OFFSETS, UNREAD, Eagle3Config, Eagle3Module, observed_layers, parse
from longspan.models.params import Shapes, validate_checkpoint
from longspan.models.registry import Family, check_checkpoint, find_family
from longspan.models.shapes import requests_of
from longspan.models.small_model import SmallModel
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import check_heads, last_layers
from longspan.weights.checkpoint import Checkpoint, NoWeights, RandomWeights
from longspan.weights.source import ModelSource, find_source, naming_files_of, open_weights
from longspan.weights.tokenizer import load_serialised

_OTHERWISE = "use --speculative prompt-lookup:4, or leave it out"


@dataclass(frozen=True)
class DraftTarget:
    """The model that a checkpoint of its own drafts for."""

    # its family
    family: Family
    # its sizes
    model: ModelConfig
    # coordinates of the ranks
    grid: Grid


def with_draft_layers(how: Speculation | None, model: ModelConfig) -> ModelConfig:
    """The model with the layers that it drafts with, or is observed at. Raises `ConfigError` if it has none."""
    if how is not None and how.method == EAGLE3:
        return replace(model, observed_layers=observed_layers(model.num_layers))
    if how is None or how.method != MTP:
        return model
    if not model.num_draft_layers:
        raise ConfigError(
            "speculative", how.text,
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


def find_checkpoint(
    config: EngineConfig, target: DraftTarget, families: Sequence[Family], opens_weights: bool
) -> DraftCheckpoint | None:
    """The checkpoint of its own that drafts; None if there is none.

    Raises `ConfigError` if it cannot draft for the model, and as `find_source` and `open_weights` do.
    """
    how = config.scheduler.speculative
    if how is None or not how.checkpoint:
        return None
    source = find_source(how.checkpoint, opens_weights)
    if opens_weights:
        source = open_weights(source)
    elif config.load_format == "dummy":
        source = replace(source, checkpoint=RandomWeights())
    with naming_files_of(source):
        found = _eagle3(how, source, target) if how.method == EAGLE3 else _small_model(how, source, families, target)
    _check_layout(how, found.model, target)
    if config.transfer is not None:
        raise _refused(
            how, "what its layers cache is not transferred between instances",
            "use mtp:K or prompt-lookup:K between a prefill and a decode instance",
        )  # fmt: skip
    return found


def check_tokens(how: Speculation, source: ModelSource, drafts: DraftCheckpoint, target: ModelConfig) -> None:
    """Raise `ConfigError` unless a small model has the tokens of the model from `source`.

    Without tokenizers to compare, the vocabularies must be equally large. Padded to different sizes they may differ.
    """
    if how.method == EAGLE3:
        return
    own, other = load_serialised(drafts.source), load_serialised(source)
    if own is None or other is None:
        same, reason = drafts.model.vocab_size == target.vocab_size, "of other sizes"
    else:
        same, reason = (json.loads(own)["model"].get("vocab") == json.loads(other)["model"].get("vocab")), "different"
    if not same:
        raise _refused(
            how, f"its vocabulary ({drafts.model.vocab_size} tokens) and the model's ({target.vocab_size}) are "
            f"{reason}", "use a small model of the same series, with the same tokenizer",
        )  # fmt: skip


def _small_model(
    how: Speculation, source: ModelSource, families: Sequence[Family], target: DraftTarget
) -> DraftCheckpoint:
    family, model = find_family(source.config, families)
    if not isinstance(source.checkpoint, NoWeights):
        check_checkpoint(family, model, source.checkpoint)
    foreign = [window for window in model.layer_groups if window not in target.model.layer_groups]
    if foreign:
        seen = "all positions" if foreign[0] is None else f"the last {foreign[0]} positions"
        raise _refused(
            how, f"{model.architecture} cannot draft for this model: it has layers that see {seen}, and the model has "
            "none", "use a small model of the same series",
        )  # fmt: skip

    def build(context: LayerContext, dtype: torch.dtype, embedding: Embed | None) -> DraftModule:
        return SmallModel(family.build(model, context, dtype), model.vocab_size, target.model.vocab_size)

    return DraftCheckpoint(source, model, build)


def _eagle3(how: Speculation, source: ModelSource, target: DraftTarget) -> DraftCheckpoint:
    model, names = target.model, source.checkpoint.names()
    config = parse(source.config, names, model)
    if target.family.build is not DecoderModel or not observed_layers(model.num_layers):
        raise _refused(
            how, f"{model.architecture} with {model.num_layers} layers does not give the hidden states of three layers",
            "use draft:K:MODEL",
        )  # fmt: skip
    if None not in model.layer_groups:
        raise _refused(
            how, f"its layer sees all positions, and {model.architecture} has no such layer", "use draft:K:MODEL"
        )
    if config.target_tokens != model.vocab_size:
        raise _refused(
            how, f"it was made for a vocabulary of {config.target_tokens} tokens, and the model's has "
            f"{model.vocab_size}", "use the module that was made for this model",
        )  # fmt: skip
    if config.layer.hidden_size != model.hidden_size and not config.has_embedding:
        raise _refused(
            how, f"it has no embedding, and its width of {config.layer.hidden_size} is not the model's "
            f"{model.hidden_size}", "use a module with an embedding of its own, or one of the model's width",
        )  # fmt: skip

    def build(context: LayerContext, dtype: torch.dtype, embedding: Embed | None) -> DraftModule:
        return Eagle3Module(config, context, dtype, embedding)

    if not isinstance(source.checkpoint, NoWeights):
        _check_eagle3(how, config, source.checkpoint, model)
        params = requests_of(partial(build, dtype=torch.float32, embedding=None)).params
        validate_checkpoint(params, source.checkpoint, tied=False, unread=UNREAD)
    return DraftCheckpoint(source, config.layer, build, observed_layers(model.num_layers))


def _check_eagle3(how: Speculation, config: Eagle3Config, checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise `ConfigError` for tensors that tell of another model than the one it is to draft for."""
    names, hidden, tokens = checkpoint.names(), model.hidden_size, model.vocab_size
    remedy = "use the module that was made for this model"
    if JOIN in names and checkpoint.shape(JOIN)[-1] != 3 * hidden:
        taken = checkpoint.shape(JOIN)[-1]
        raise _refused(how, f"{JOIN} takes {taken} elements, and three rows of the model have {3 * hidden}", remedy)
    if MASK in names and checkpoint.shape(MASK) != (tokens,):
        found = checkpoint.shape(MASK)
        raise _refused(how, f"{MASK} has shape {found}, and the model's vocabulary {tokens} tokens", remedy)
    if config.has_offsets and OFFSETS in names and checkpoint.shape(OFFSETS) == (config.layer.vocab_size,):
        size = config.layer.vocab_size
        offsets = torch.empty(size, dtype=torch.int64)
        checkpoint.read(OFFSETS, (slice(0, size),), offsets)
        least, most = (int(each) for each in (offsets + torch.arange(size)).aminmax())
        if least < 0 or most >= tokens:
            raise _refused(
                how, f"{OFFSETS} leads to tokens {least} to {most}, and the model has {tokens}", "download it again"
            )


def _check_layout(how: Speculation, drafts: ModelConfig, target: DraftTarget) -> None:
    """Raise `ConfigError` if its heads cannot be split as the layout asks, or it needs all layers on one rank."""
    try:
        check_heads(target.grid, drafts.num_q_heads)
    except ConfigError as error:
        problem = error.problem.replace("the model's", "its own")
        remedy = f"{error.remedy}, or use another model to draft"
        raise _refused(how, f"{error.field}={error.value} {problem}", remedy) from error
    layers = target.model.num_layers
    if how.method == EAGLE3 and last_layers(target.grid, layers) < layers:
        raise _refused(
            how, "it takes the hidden states of layers that are on different pipeline stages",
            "use draft:K:MODEL, or leave out --pipeline-parallel-size",
        )  # fmt: skip


def _refused(how: Speculation, problem: str, remedy: str) -> ConfigError:
    return ConfigError("speculative", how.text, problem, remedy)
