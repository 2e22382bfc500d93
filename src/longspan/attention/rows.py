"""Rows of the KV cache as tensors: values, and the scales of quantised ones.

It owns quantisation, reading back and the form in which rows travel; it must not know whose rows they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.cache.pages import Span

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class CacheRows:
    """Keys and values [kv_factor, Hkv, slots, D] of one layer; a latent cache has one row for both.

    Quantised values (int8 or float8_e4m3fn) have `scales` [kv_factor, Hkv, slots, G] fp32: one for each of
    the G groups of neighbouring elements whose widths are `groups`. A row then stands for value · scale.
    """

    values: Tensor
    scales: Tensor | None = None
    groups: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of slots."""
        return self.values.shape[2]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.values.shape[3]

    def at(self, span: Span) -> CacheRows:
        """The slots of a span, as a view."""
        stop = span.slot + span.length
        scales = None if self.scales is None else self.scales[:, :, span.slot : stop]
        return CacheRows(self.values[:, :, span.slot : stop], scales, self.groups)

    def take(self, spans: Sequence[Span]) -> CacheRows:
        """The slots of `spans`, one behind the other; a copy if there are several."""
        if len(spans) == 1:
            return self.at(spans[0])
        parts = [self.at(span) for span in spans] or [self.at(Span(0, 0))]
        scales = None if self.scales is None else torch.cat([_scales(part) for part in parts], dim=2)
        return CacheRows(_join([part.values for part in parts]), scales, self.groups)

    def read(self, dtype: torch.dtype) -> Tensor:
        """What the rows stand for: [kv_factor, Hkv, slots, D]."""
        if self.scales is None:
            return self.values
        return (self.values.float() * _spread(self.scales, self.groups)).to(dtype)

    def select(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """What single rows stand for: [N, D], of `places` [N] counted over kv_factor, heads and slots."""
        values = self.values.view(-1, self.width).index_select(0, places)
        if self.scales is None:
            return values
        scales = self.scales.view(-1, len(self.groups)).index_select(0, places)
        return (values.float() * _spread(scales, self.groups)).to(dtype)

    @property
    def is_whole(self) -> bool:
        """Whether `select` can be used: rows of a pool, not a part of one."""
        return self.values.is_contiguous()

    def packed(self) -> Tensor:
        """As one tensor, to travel: the values, or of quantised rows bytes [kv_factor, Hkv, slots, D + 4·G]."""
        if self.scales is None:
            return self.values
        return torch.cat([self.values.view(torch.uint8), self.scales.contiguous().view(torch.uint8)], dim=-1)

    def unpacked(self, packed: Tensor) -> CacheRows:
        """The rows of a tensor that rows like these were packed into."""
        if self.scales is None:
            return CacheRows(packed)
        values = packed[..., : self.width].contiguous().view(self.values.dtype)
        return CacheRows(values, packed[..., self.width :].contiguous().view(torch.float32), self.groups)


def quantise(x: Tensor, dtype: torch.dtype, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x [..., D] as (values [..., D] of `dtype`, scales [..., G] fp32): a group's largest magnitude is the dtype's."""
    parts = torch.split(x.float(), list(groups), dim=-1)
    scales = torch.stack([part.abs().amax(-1) for part in parts], dim=-1) / LARGEST[dtype]
    scaled = x.float() / _spread(scales.clamp_min(torch.finfo(torch.float32).tiny), groups)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales


def through(x: Tensor, like: CacheRows) -> Tensor:
    """What x [..., D] reads as once it is cached: the same whether a token is attended fresh or from the cache."""
    if like.scales is None:
        return x
    values, scales = quantise(x, like.values.dtype, like.groups)
    return (values.float() * _spread(scales, like.groups)).to(x.dtype)


def unit_stride(x: Tensor) -> Tensor:
    """x itself where the elements of a row are neighbours, which kernels take for granted; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _spread(scales: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Scales [..., G] that broadcast against rows [..., D]."""
    if len(groups) == 1:
        return scales
    return torch.cat([scales[..., n : n + 1].expand(*scales.shape[:-1], w) for n, w in enumerate(groups)], dim=-1)


def _scales(rows: CacheRows) -> Tensor:
    if rows.scales is None:
        raise TypeError("rows without scales among quantised ones")
    return rows.scales


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Along slots; as bytes, since not every device joins 8-bit floats."""
    if parts[0].element_size() > 1:
        return torch.cat(list(parts), dim=2)
    return torch.cat([part.view(torch.uint8) for part in parts], dim=2).view(parts[0].dtype)
