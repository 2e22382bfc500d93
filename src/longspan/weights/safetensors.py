"""Safetensors folders: one file, or shards under an index.

It owns the files' handles; a slice is read from the file's map, nothing around it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from longspan.errors import ModelNotFound, WeightError
from longspan.weights.checkpoint import missing_tensor

_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """The tensors of a folder. Raises `WeightError` if a file is missing or damaged, before anything is read."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Any] = {}
        for path in _files(folder):
            handle = _open(path)
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> frozenset[str]:
        """See `Checkpoint.names`."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        out.copy_(self._slice(name)[index])

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise missing_tensor(name, self.names())
        return self._file_of[name].get_slice(name)


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightError(f"{index}: is not a safetensors index ({error}); download it again") from error
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelNotFound(
            f"{folder}: no .safetensors file in it; download the model in safetensors format, or convert it"
        )
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError as error:
        raise WeightError(f"{path}: a file named by the index is missing; download it again") from error
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path}: truncated or damaged ({error}); download it again") from error
