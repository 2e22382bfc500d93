"""Bytes of one weight, by the part of the model that it belongs to.

It owns the names of weight formats and how they are read from `quantization_config`; it must not know shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from longspan.config import require_choice
from longspan.errors import ModelError

_BYTES: Mapping[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625, "mxfp4": 0.53125
}  # fmt: skip  # int4 has a scale of 16 bits for 32 weights, mxfp4 a scale of 8 bits for 32
FORMAT_NAMES = tuple(_BYTES)
_MODULES: Mapping[str, str] = {
    "attention": "model.layers.5.self_attn.o_proj",
    "ffn": "model.layers.5.mlp.down_proj",
    "experts": "model.layers.5.mlp.experts.0.down_proj",
}  # one module of each part, on which `modules_to_not_convert` is tested


@dataclass(frozen=True)
class WeightFormat:
    """Bytes of one weight in each part of the model.

    Weights of one byte or more are multiplied in their own format; narrower ones are widened to two bytes first.
    """

    # projections of attention
    attention: float = 2.0
    # dense MLPs and shared experts
    ffn: float = 2.0
    # routed experts
    experts: float = 2.0
    # the embedding; activations have this size too
    embedding: float = 2.0

    @staticmethod
    def named(name: str, dtype: str = "bf16") -> WeightFormat:
        """Projections, MLPs and experts in one of `FORMAT_NAMES`, the embedding in `dtype`. Raises `ConfigError`."""
        require_choice("weight_dtype", name, FORMAT_NAMES)
        each = _BYTES[name]
        return WeightFormat(each, each, each, element_bytes("dtype", dtype))

    @staticmethod
    def of(values: Mapping[str, Any], dtype: str = "bf16") -> WeightFormat:
        """The format that a config.json declares; without `quantization_config` all weights are in `dtype`."""
        plain = element_bytes("dtype", dtype)
        found = WeightFormat(plain, plain, plain, plain)
        quantisation = values.get("quantization_config")
        if not isinstance(quantisation, Mapping):
            return found
        each = _BYTES[_format(quantisation)]
        patterns = quantisation.get("modules_to_not_convert") or quantisation.get("ignore") or []
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ModelError(
                f"quantization_config: modules_to_not_convert={patterns!r:.80} must be a list of names; fix config.json"
            )
        converted = [part for part, module in _MODULES.items() if not any(_names(p, module) for p in patterns)]
        return replace(found, **dict.fromkeys(converted, each))


def element_bytes(field: str, name: str) -> float:
    """Bytes of one element in a named format. `field` is the option that the `ConfigError` names."""
    require_choice(field, name, FORMAT_NAMES)
    return _BYTES[name]


def _names(pattern: str, module: str) -> bool:
    """Whether an entry of `modules_to_not_convert`, a prefix or `re:` and a regular expression, matches a module."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise ModelError(f"quantization_config: ignore={pattern:.80} is no expression ({error})") from error
    return fnmatch(module, pattern + "*")


def _format(quantisation: Mapping[str, Any]) -> str:
    method = str(quantisation.get("quant_method", "fp8"))
    if method in _BYTES:
        return method
    four_bits = "num_bits': 4" in str(quantisation) or quantisation.get("bits") == 4 or method == "awq"
    return "int4" if four_bits else "fp8"
