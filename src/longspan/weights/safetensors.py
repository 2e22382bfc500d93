"""Folders of safetensors files: one file, or several with an index.

It owns the open files. They are memory-mapped, so only the slices that are asked for are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longspan.errors import ModelNotFound, WeightError
from longspan.weights.checkpoint import missing_tensor
from longspan.weights.json_file import read_object

_SCALE = "_scale_inv"
_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """The tensors of a folder. Raises `WeightError` at construction if a file is missing or damaged.

    An FP8 tensor with one scale for each block of `scale_block` (rows, columns), as in DeepSeek-V3, is dequantised as
    it is read. Its scales are not listed as tensors.
    """

    def __init__(self, folder: Path, scale_block: tuple[int, int] = (128, 128)) -> None:
        self.scale_block = scale_block
        self._file_of: dict[str, Any] = {}
        for path in _files(folder):
            handle = _open(path)
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> frozenset[str]:
        """See `Checkpoint.names`."""
        return frozenset(name for name in self._file_of if not self._is_scale(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        part = self._slice(name)[index]
        if self.has_scales(name):
            part = part.float() * self._scales(name, index)
        out.copy_(part)

    def has_scales(self, name: str) -> bool:
        """Whether a tensor is in block-scaled FP8."""
        return name + _SCALE in self._file_of

    def read_scaled(self, name: str, index: tuple[slice, ...], values: Tensor, scales: Tensor) -> None:
        """Copy a slice of a block-scaled FP8 tensor without dequantising it, and the scales of its blocks.

        The slice must begin and end at block boundaries. `values` is FP8 [rows, columns], `scales` has one element for
        each block of the slice.
        """
        blocks = tuple(
            slice(part.start // size, -(-part.stop // size)) for part, size in zip(index, self.scale_block, strict=True)
        )
        values.copy_(self._slice(name)[index])
        scales.copy_(self._slice(name + _SCALE)[blocks])

    def _is_scale(self, name: str) -> bool:
        return name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._file_of

    def _scales(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The scale of each element of the slice, fp32 [rows, columns]."""
        scales: Tensor = self._slice(name + _SCALE)[:].float()
        if scales.dim() != len(index):
            raise WeightError(
                f"{name + _SCALE}: shape {tuple(scales.shape)} is not one scale for each block of {self.shape(name)}; "
                "use the unquantised model"
            )
        for dim, (part, size) in enumerate(zip(index, self.scale_block, strict=True)):
            blocks = torch.arange(part.start, part.stop) // size
            if part.stop > scales.shape[dim] * size:
                raise WeightError(
                    f"{name + _SCALE}: shape {tuple(scales.shape)} has too few scales for {self.shape(name)} in blocks "
                    f"of {self.scale_block}; the config.json's weight_block_size is another model's"
                )
            scales = scales.index_select(dim, blocks)
        return scales

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise missing_tensor(name, self.names())
        return self._file_of[name].get_slice(name)


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        files = read_object(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise WeightError(f"{index}: weight_map={files!r:.80} lists no files of tensors; download it again")
        for tensor, name in files.items():
            # a path could lead to any file of the machine
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise WeightError(
                    f"{index}: weight_map.{tensor:.80}={name!r:.80} is not the name of a .safetensors file "
                    "beside it; download it again"
                )
        return [folder / name for name in sorted(set(files.values()))]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelNotFound(
            f"{folder}: no .safetensors file in it; download the model in safetensors format, or convert it"
        )
    return files


def _open(path: Path) -> Any:
    if path.exists() and not path.is_file():  # of a pipe, the end would be waited for
        raise WeightError(f"{path}: is no file; download it again")
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError as error:
        raise WeightError(f"{path}: a file named by the index is missing; download it again") from error
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path}: truncated or damaged ({error}); download it again") from error
