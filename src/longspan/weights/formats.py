"""How many bytes a weight takes, by the part of the model it belongs to.

It owns the formats' names and their reading from a configuration's `quantization_config`; it must not know shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from longspan.config import require_choice

_BYTES: Mapping[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625, "mxfp4": 0.53125
}  # fmt: skip  # 4 bits with a scale of 16 bits for 32 weights, of 8 bits for 32
FORMAT_NAMES = tuple(_BYTES)
_MODULES: Mapping[str, str] = {
    "attention": "model.layers.5.self_attn.o_proj",
    "ffn": "model.layers.5.mlp.down_proj",
    "experts": "model.layers.5.mlp.experts.0.down_proj",
}  # one that stands for all of a part


@dataclass(frozen=True)
class WeightFormat:
    """Bytes an element of attention's projections, of dense and shared MLPs, of routed experts, and of the embedding.

    Formats of one byte are multiplied as they are; those of less are widened to two bytes first. The embedding's is
    also that of activations.
    """

    attention: float = 2.0
    ffn: float = 2.0
    experts: float = 2.0
    embedding: float = 2.0

    @staticmethod
    def named(name: str, dtype: str = "bf16") -> WeightFormat:
        """All products in one of `FORMAT_NAMES`, the embedding in `dtype`. Raises `ConfigError`."""
        require_choice("weight_dtype", name, FORMAT_NAMES)
        each = _BYTES[name]
        return WeightFormat(each, each, each, element_bytes("dtype", dtype))

    @staticmethod
    def of(values: Mapping[str, Any], dtype: str = "bf16") -> WeightFormat:
        """What a config.json says of its checkpoint; without `quantization_config` all weights are in `dtype`."""
        plain = element_bytes("dtype", dtype)
        found = WeightFormat(plain, plain, plain, plain)
        quantisation = values.get("quantization_config")
        if not isinstance(quantisation, Mapping):
            return found
        each = _BYTES[_format(quantisation)]
        patterns = quantisation.get("modules_to_not_convert") or quantisation.get("ignore") or ()
        converted = [part for part, module in _MODULES.items() if not any(_names(p, module) for p in patterns)]
        return replace(found, **dict.fromkeys(converted, each))


def element_bytes(field: str, name: str) -> float:
    """Bytes an element of a named format. Raises `ConfigError`."""
    require_choice(field, name, FORMAT_NAMES)
    return _BYTES[name]


def _names(pattern: str, module: str) -> bool:
    """Whether an entry of the list of modules left alone, a beginning or `re:` and an expression, means this one."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatch(module, pattern + "*")


def _format(quantisation: Mapping[str, Any]) -> str:
    method = str(quantisation.get("quant_method", "fp8"))
    if method in _BYTES:
        return method
    four_bits = "num_bits': 4" in str(quantisation) or quantisation.get("bits") == 4 or method == "awq"
    return "int4" if four_bits else "fp8"
