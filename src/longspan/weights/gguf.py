"""GGUF files: their tensors under Hugging Face's names, dequantised block by block.

It owns the names of tensors in GGUF files and the order of their rotary rows; it must not know how a model is sharded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from longspan.errors import UnsupportedModel, WeightError
from longspan.weights.checkpoint import missing_tensor

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


class GGUFCheckpoint:
    """The tensors and metadata of a GGUF file.

    Raises `WeightError` if it is damaged, `UnsupportedModel` if it is split or has a quantisation that the gguf package
    cannot dequantise.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader's exception for a damaged file depends on where the damage is
            raise WeightError(f"{path}: truncated or not a GGUF file ({error}); download it again") from error
        self._tensors = {hub_name(tensor.name): tensor for tensor in self._reader.tensors}
        if self.metadata("split.count", 1) > 1:
            raise UnsupportedModel(f"{path}: one of several split GGUF files; join them with llama-gguf-split --merge")
        self._check_quantisations()

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a metadata field, or `default` if it is missing."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def names(self) -> frozenset[str]:
        """See `Checkpoint.names`."""
        return frozenset(self._tensors) - {ROPE_FACTORS}

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def rope_factors(self) -> list[float] | None:
        """One divisor for each rotary frequency (llama3 scaling); None if the file has none."""
        tensor = self._tensors.get(ROPE_FACTORS)
        return None if tensor is None else [float(value) for value in tensor.data]

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        tensor = self._tensor(name)
        rows = self._stored_rows(name)(np.arange(index[0].start, index[0].stop))
        per_row = max(1, int(np.prod(self.shape(name)[1:], dtype=np.int64)))
        step = max(1, _BLOCK_ELEMENTS // per_row)
        for first in range(0, len(rows), step):
            packed = np.ascontiguousarray(tensor.data[rows[first : first + step]])
            block = gguf.quants.dequantize(packed, tensor.tensor_type)
            out[first : first + step].copy_(torch.from_numpy(block[(slice(None), *index[1:])]))

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
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"{name}: quantisation {tensor.tensor_type.name} cannot be dequantised by the gguf package; "
                    "use a file in Q4_0..Q8_0, a K-quant, F16, BF16 or F32, or update gguf"
                ) from error
