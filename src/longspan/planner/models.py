"""Finds the configuration of a model: by a built-in name, a folder, a config.json, a GGUF file or a hub id.

Unlike the engine, it needs no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import ModelError, ModelNotFound
from longspan.models.config import ModelConfig
from longspan.models.registry import load_config
from longspan.weights.builtin import HUB_ID, builtin_config, builtin_name, builtin_names, near_names
from longspan.weights.formats import WeightFormat

_KV_HEADS = re.compile(r"(.+) with (\d+) kv heads?")


def find_config(name: str) -> Mapping[str, Any]:
    """The config.json of a model. A unique prefix of a built-in name is enough.

    `NAME with N kv heads` is NAME with another number of KV heads. Raises `ModelNotFound`, which names similar names,
    or `ModelError` for a file that cannot be read.
    """
    changed = _KV_HEADS.fullmatch(name.strip())
    if changed:
        return {**find_config(changed[1]), "num_key_value_heads": int(changed[2])}
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelNotFound(f"model={name}: the folder has no config.json; give a folder with one")
    if path.is_file():
        return _read(path)
    built_in = builtin_name(name)
    if built_in is not None:
        return builtin_config(built_in)
    if HUB_ID.fullmatch(name):
        return _download(name)
    near = near_names(name) or builtin_names()
    raise ModelNotFound(
        f"model={name}: no such folder or built-in model; use one of {', '.join(near)}, "
        "a folder with config.json, or a hub id (org/name)"
    )


def find_model(name: str, dtype: str = "bf16", weight_dtype: str | None = None) -> tuple[ModelConfig, WeightFormat]:
    """The model and the format of its weights: `weight_dtype`, or the one its configuration names."""
    values = find_config(name)
    weights = WeightFormat.of(values, dtype) if weight_dtype is None else WeightFormat.named(weight_dtype, dtype)
    return load_config(values), weights


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".gguf":
        from longspan.weights.gguf import GGUFCheckpoint
        from longspan.weights.gguf_config import gguf_config

        return gguf_config(GGUFCheckpoint(path))
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; correct the JSON") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); give a config.json") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: line 1, column 1: is not a JSON object; give a model's config.json")
    return values


def _download(name: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download  # slow to import, and needed only for hub ids

    try:
        return _read(Path(hf_hub_download(name, "config.json")))
    except ModelError:
        raise
    except Exception as error:  # the hub's many network, name and permission errors
        near = near_names(name)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"model={name}: fetching its config.json from the hub failed ({reason}); check the name and the network"
            + (f", or use one of {', '.join(near)}" if near else "")
        ) from error
