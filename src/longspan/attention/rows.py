"""Rows of the KV cache as tensors: the values, and the scales of quantised rows.

It owns quantisation, dequantisation, and the format in which rows are sent between ranks; it must not know which
requests the rows belong to.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longspan.cache.pages import Span

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each quantised dtype, to which the largest magnitude of a group is mapped."""


@dataclass(frozen=True)
class CacheRows:
    """Cached rows of one layer: those of a pool, of a part of one, or rows that were received from another rank."""

    # [kv_factor, Hkv, S, D]; quantised values are int8 or float8_e4m3fn
    values: Tensor
    # [kv_factor, Hkv, S, G] fp32: an element of a quantised row is value · scale; None if rows are not quantised
    scales: Tensor | None = None
    # widths of the G groups of adjacent elements that share a scale
    groups: tuple[int, ...] = ()
    # the same layer's rows in the pools of other ranks, where they can be read in place. Their slots follow these
    peers: tuple[CacheRows, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of slots, S, without those of peers."""
        return self.values.shape[2]

    @property
    def width(self) -> int:
        """Elements of a row, D."""
        return self.values.shape[3]

    @cached_property
    def pool_words(self) -> array[int]:
        """These rows and those of peers for kernels in C: each as the words of `Pool` in `cache_rows.h`."""
        words, first = array("q"), 0
        for held in (self, *self.peers):
            planes = [held.values[plane].data_ptr() for plane in (0, -1)]
            scales = [0, 0] if held.scales is None else [held.scales[plane].data_ptr() for plane in (0, -1)]
            scale_head = 0 if held.scales is None else held.scales.stride(1)
            words.extend((first, *planes, *scales, held.values.stride(1), scale_head))
            first += held.tokens
        return words

    def at(self, span: Span) -> CacheRows:
        """The rows of a span, as views."""
        held, start = self, span.slot
        for peer in self.peers:
            if start < held.tokens:
                break
            held, start = peer, start - held.tokens
        stop = start + span.length
        scales = None if held.scales is None else held.scales[:, :, start:stop]
        return CacheRows(held.values[:, :, start:stop], scales, self.groups)

    def take(self, spans: Sequence[Span]) -> CacheRows:
        """The rows of `spans`, concatenated; views if there is one span, else a copy."""
        if len(spans) == 1:
            return self.at(spans[0])
        parts = [self.at(span) for span in spans] or [self.at(Span(0, 0))]
        scales = None if self.scales is None else torch.cat([_scales(part) for part in parts], dim=2)
        return CacheRows(_join([part.values for part in parts]), scales, self.groups)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The dequantised rows [kv_factor, Hkv, S, D] in `dtype`, or the rows as they are if they are not quantised."""
        if self.scales is None:
            return self.values
        return (self.values.float() * _spread(self.scales, self.groups)).to(dtype)

    def select(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Single dequantised rows [R, D]. `places` [R] int64 are indices into the flattened dimensions before D.

        Needs `is_whole`.
        """
        values = self.values.view(-1, self.width).index_select(0, places)
        if self.scales is None:
            return values
        scales = self.scales.view(-1, len(self.groups)).index_select(0, places)
        return (values.float() * _spread(scales, self.groups)).to(dtype)

    @property
    def is_whole(self) -> bool:
        """Whether the values are contiguous: those of one whole pool, not of a part of one, nor of several."""
        return self.values.is_contiguous() and not self.peers

    def packed(self) -> Tensor:
        """The rows as one tensor, to be sent: [kv_factor, Hkv, S, D], or bytes [kv_factor, Hkv, S, D + 4 · G]."""
        if self.scales is None:
            return self.values
        return torch.cat([self.values.view(torch.uint8), self.scales.contiguous().view(torch.uint8)], dim=-1)

    def unpacked(self, packed: Tensor) -> CacheRows:
        """The inverse of `packed`, for rows of the same dtype, width and groups as these."""
        if self.scales is None:
            return CacheRows(packed)
        values = packed[..., : self.width].contiguous().view(self.values.dtype)
        return CacheRows(values, packed[..., self.width :].contiguous().view(torch.float32), self.groups)


def quantise(x: Tensor, dtype: torch.dtype, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x [..., D] → (values [..., D] of `dtype`, scales [..., G] fp32), so that x is about values · scales.

    The largest magnitude of each group is mapped to the largest number of `dtype`.
    """
    parts = torch.split(x.float(), list(groups), dim=-1)
    peaks = torch.stack([part.abs().amax(-1) for part in parts], dim=-1)
    # divided by a tensor, because by a number PyTorch multiplies with its rounded reciprocal on a GPU
    scales = peaks / peaks.new_full((), LARGEST[dtype])
    scaled = x.float() / _spread(scales.clamp_min(torch.finfo(torch.float32).tiny), groups)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales


def through(x: Tensor, like: CacheRows) -> Tensor:
    """x [..., D] quantised and dequantised, as it will be read from a cache like `like`.

    The diagonal attends to such rows, so that a token's result does not depend on where a chunk ends.
    """
    if like.scales is None:
        return x
    values, scales = quantise(x, like.values.dtype, like.groups)
    return (values.float() * _spread(scales, like.groups)).to(x.dtype)


def unit_stride(x: Tensor) -> Tensor:
    """x itself if the elements of a row are adjacent in memory, as kernels expect; else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _spread(scales: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Scales [..., G] expanded so that they broadcast against rows [..., D]."""
    if len(groups) == 1:
        return scales
    return torch.cat([scales[..., n : n + 1].expand(*scales.shape[:-1], w) for n, w in enumerate(groups)], dim=-1)


def _scales(rows: CacheRows) -> Tensor:
    """The scales of quantised rows."""
    if rows.scales is None:
        raise TypeError("rows without scales among quantised ones")
    return rows.scales


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along slots. 8-bit values are joined as bytes, as not every device concatenates 8-bit floats."""
    if parts[0].element_size() > 1:
        return torch.cat(list(parts), dim=2)
    return torch.cat([part.view(torch.uint8) for part in parts], dim=2).view(parts[0].dtype)
