"""GGUF files: their tensors under Hugging Face's names, dequantised block by block.

It owns the names of tensors in GGUF files and the order of their rotary rows; it must not know how a model is sharded.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.compiled.blocks import QuantisedBlocks, joined
from longspan.errors import UnsupportedModel, WeightError
from longspan.weights.checkpoint import missing_tensor
from longspan.weights.gguf_blocks import block_width_of, unpacked

_MAX_ARRAY = 1 << 21  # elements of a metadata field; vocabularies have up to 2^18 tokens, and twice as many merges
_MAX_ENTRIES = 1 << 16  # metadata fields, and tensors
_KIND_BYTES, _SIZE_BYTES = 4, 8  # of an array's type of elements, and of the length of an array or a string
_BLOCK_ELEMENTS = 4 << 20  # fp32 elements held at once while dequantising: 16 MB
ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hub_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name is returned unchanged."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else name


class _String(bytes):
    """A string of a metadata field, with the one method of an array that the package calls."""

    __slots__ = ()

    def tobytes(self) -> bytes:
        """The string itself."""
        return self


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The package's reader, which takes what a file says of its own sizes for true, with a check of each.

    Without it a small file that claims 2^50 elements is read for ever. Arrays are read at once: the package makes two
    NumPy arrays of every element, which for a vocabulary of 49,152 tokens takes 1.6 s and 150 MB.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
        found = super()._get(offset, dtype, count, *rest, **more)
        if len(found) < count:
            raise ValueError(f"the file ends at byte {len(self.data)}, within what begins at byte {int(offset)}")
        return found

    def _build_fields(self, offs: int, count: int) -> Any:
        _check_entries(count, "metadata fields")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        _check_entries(count, "tensors")
        return super()._build_tensor_info(offs, count)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, size = self._get(orig_offs, np.uint32), self._get(orig_offs + _KIND_BYTES, np.uint64)
        length, start = int(size[0]), orig_offs + _KIND_BYTES + _SIZE_BYTES
        if length > min(_MAX_ARRAY, len(self.data) - orig_offs):
            raise ValueError(f"the array at byte {orig_offs} has {length} elements")
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
        if types[1] in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[types[1]], length)
            return start + values.nbytes - orig_offs, [kind, size, values], [2], types
        if types[1] == gguf.GGUFValueType.STRING and self.byte_order == "I":
            stop, strings = self._strings(start, length)
            return stop - orig_offs, [kind, size, *strings], range(2, 2 + length), types
        return super()._get_field_parts(orig_offs, raw_type)

    def _strings(self, offset: int, count: int) -> tuple[int, list[_String]]:
        """The strings of an array, and where they end."""
        memory, found = memoryview(self.data), []
        for _ in range(count):
            start = offset + _SIZE_BYTES
            offset = start + int.from_bytes(memory[start - _SIZE_BYTES : start], sys.byteorder)
            if offset > len(memory):
                raise ValueError(f"the file ends at byte {len(memory)}, within the string at byte {start}")
            found.append(_String(memory[start:offset]))
        return offset, found

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            offset = int(field.parts[5][0])  # the reader would add it to `start_offs` in 64 bits
            if offset > len(self.data) or offset % self.alignment:
                raise ValueError(
                    f"the tensor {field.name} has offset {offset}, which must be a multiple of {self.alignment} "
                    f"within the {len(self.data)} bytes of the file"
                )
        super()._build_tensors(start_offs, fields)

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        field = super()._get_tensor_info_field(orig_offs)
        elements = math.prod(field.parts[3].tolist())
        if elements > 256 * len(self.data):  # no format has less than a bit for an element
            raise ValueError(f"the tensor {field.name} has {elements} elements")
        return field


def _check_entries(count: int, kind: str) -> None:
    if count > _MAX_ENTRIES:
        raise ValueError(f"it has {count} {kind}")


class GGUFCheckpoint:
    """The tensors and metadata of a GGUF file.

    Raises `WeightError` if it is damaged, `UnsupportedModel` if it is split or has a quantisation that the gguf package
    cannot dequantise.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = _Reader(path)
        except Exception as error:  # the reader's exception for a damaged file depends on where the damage is
            raise WeightError(f"{path}: truncated or not a GGUF file ({error}); download it again") from error
        self.path = path
        self._tensors = {hub_name(tensor.name): tensor for tensor in self._reader.tensors}
        if self.metadata("split.count", 1) not in (0, 1):
            raise UnsupportedModel(f"{path}: one of several split GGUF files; join them with llama-gguf-split --merge")
        self._check_quantisations()

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a metadata field, or `default` if it is missing. Raises `WeightError` if it is no UTF-8."""
        field = self._reader.fields.get(key)
        try:
            return default if field is None else field.contents()
        except ValueError as error:
            raise WeightError(f"{self.path}: {key} cannot be read ({error}); download it again") from error

    def names(self) -> frozenset[str]:
        """See `Checkpoint.names`."""
        return frozenset(self._tensors) - {ROPE_FACTORS}

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def rope_factors(self) -> list[float] | None:
        """One divisor for each rotary frequency (llama3 scaling); None if the file has none."""
        tensor = self._tensors.get(ROPE_FACTORS)
        return None if tensor is None else [float(value) for value in tensor.data.reshape(-1)]

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        kind, done = self._tensor(name).tensor_type, 0
        for packed in self._packed(name, index[0]):
            block = gguf.quants.dequantize(packed, kind)
            out[done : done + len(packed)].copy_(torch.from_numpy(block[(slice(None), *index[1:])]))
            done += len(packed)

    def block_width(self, name: str) -> int | None:
        """See `BlockCheckpoint.block_width`."""
        return block_width_of(self._tensor(name).tensor_type)

    def read_blocks(self, name: str, index: tuple[slice, ...]) -> QuantisedBlocks:
        """See `BlockCheckpoint.read_blocks`."""
        kind = self._tensor(name).tensor_type
        return joined([unpacked(packed, kind).columns(index[1]) for packed in self._packed(name, index[0])])

    def _packed(self, name: str, wanted: slice) -> Iterator[NDArray[np.uint8]]:
        """The wanted rows as they are stored, some at a time so that few are held twice."""
        rows = self._stored_rows(name)(np.arange(wanted.start, wanted.stop))
        per_row = max(1, int(np.prod(self.shape(name)[1:], dtype=np.int64)))
        step = max(1, _BLOCK_ELEMENTS // per_row)
        for first in range(0, len(rows), step):
            yield np.ascontiguousarray(self._tensor(name).data[rows[first : first + step]])

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise missing_tensor(name, self.names())
        return self._tensors[name]

    def _stored_rows(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        """The function that maps row numbers of the Hugging Face tensor to row numbers of the file's tensor.

        Converters to GGUF interleave the two rotary halves of each head in the query and key projections of `llama`
        models: row (head, half, i) becomes row (head, i, half).
        """
        suffix = re.search(r"self_attn\.([qk])_proj\.(weight|bias)$", name)
        if self.metadata("general.architecture") != "llama" or not suffix:
            return lambda rows: rows
        key = "head_count" if suffix[1] == "q" else "head_count_kv"
        heads = self.metadata(f"llama.attention.{key}", self.metadata("llama.attention.head_count"))
        head_dim = self.shape(name)[0] // heads
        half = head_dim // 2

        def interleaved(rows: np.ndarray) -> np.ndarray:
            within = rows % head_dim
            stored: np.ndarray = rows - within + within % half * 2 + within // half
            return stored

        return interleaved

    def _check_quantisations(self) -> None:
        checked = set()
        for name, tensor in self._tensors.items():
            if tensor.tensor_type in checked:
                continue
            checked.add(tensor.tensor_type)
            try:
                gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
            except (ValueError, IndexError) as error:
                raise WeightError(
                    f"{self.path}: {name}, shape {self.shape(name)}, is no tensor in {tensor.tensor_type.name} "
                    f"({error}); download it again"
                ) from error
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"{name}: quantisation {tensor.tensor_type.name} cannot be dequantised by the gguf package; "
                    "use a file in Q4_0..Q8_0, a K-quant, F16, BF16 or F32, or update gguf"
                ) from error
