"""Rotary position embedding and its scalings.

It owns the frequencies; `ops` rotate. It must not know which tokens or heads are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from longspan.errors import ModelError, UnsupportedModel
from longspan.models.config import RopeConfig
from longspan.models.context import LayerContext
from longspan.models.ops.base import RopeTable

Frequencies = tuple[Tensor, float]
"""(inverse frequencies [rotary dim / 2] fp32, factor on cos and sin)."""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Frequencies:
    """The frequencies of a head of `head_dim` elements. Raises `UnsupportedModel` for an unknown `rope_type`."""
    scale = _SCALINGS.get(rope.rope_type)
    if scale is None:
        raise UnsupportedModel(f"rope_type={rope.rope_type} is not supported; supported are {', '.join(_SCALINGS)}")
    dim = int(head_dim * rope.partial_rotary_factor)
    inverse = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    return scale(rope, inverse, dim)


def _default(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """No scaling. `inverse` [rotary dim / 2] are the frequencies without scaling, here and below."""
    return inverse, 1.0


def _linear(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """Position interpolation (Chen et al. 2023): all frequencies are divided by `factor`."""
    return inverse / float(rope.require("factor")), 1.0


def _dynamic(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """Dynamic NTK for contexts up to the trained length, where it changes nothing.

    In longer contexts the frequencies would depend on the length, and cached keys would have to be rotated again.
    """
    return inverse, 1.0


def _factors(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """A divisor for each frequency: this is how GGUF files store llama3 scaling."""
    factors = torch.tensor(rope.require("factors"), dtype=torch.float32)
    if factors.shape != inverse.shape:
        raise ModelError(f"rope factors: {len(factors)} given, {len(inverse)} expected; convert the file again")
    return inverse / factors, 1.0


def _llama3(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones are kept, with a ramp between."""
    factor, low, high = (float(rope.require(n)) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope.require("original_max_position_embeddings"))
    wavelength = 2 * math.pi / inverse
    smooth = (trained / wavelength - low) / (high - low)
    ramp = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > trained / low, inverse / factor, inverse)
    medium = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(medium, ramp, scaled), 1.0


def _yarn(rope: RopeConfig, inverse: Tensor, dim: int) -> Frequencies:
    """YaRN (Peng et al. 2023, eqs. 17-23)."""
    trained = float(rope.get("original_max_position_embeddings") or rope.max_position_embeddings)
    given = rope.get("factor") if rope.get("original_max_position_embeddings") else rope.require("factor")
    factor = float(given or rope.max_position_embeddings / trained)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)

    def dimension(rotations: float) -> float:
        """The dimension whose frequency makes so many rotations within the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(fast), dimension(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return inverse / factor * (1 - keep) + inverse * keep, _yarn_attention(rope, factor)


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    """YaRN's factor on cos and sin, which changes the temperature of the scores."""

    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope.get("mscale")) / mscale(rope.get("mscale_all_dim"))
    return mscale(1.0)


_SCALINGS: Mapping[str, Callable[[RopeConfig, Tensor, int], Frequencies]] = MappingProxyType(
    {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "factors": _factors,
    }
)


class Rotary:
    """The frequencies of a model's rope, and the table of a step that follows from them."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, context: LayerContext) -> None:
        inverse, self._factor = rope_frequencies(rope, head_dim)
        self._inverse = inverse.to(context.loader.device)
        self._dtype = dtype
        self._ops = context.ops

    def table(self, positions: Tensor) -> RopeTable:
        """The table of int64 positions [T]."""
        return self._ops.rope_table(positions, self._inverse, self._factor, self._dtype)
