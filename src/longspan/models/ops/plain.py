"""The operations between matrix products with PyTorch, on any device. They are the reference for other forms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models.ops.base import RopeTable, Table, plain_table

SWISH_SLOPE = 1.702  # in the gate of gpt-oss


class PlainOps:
    """See `LayerOps`."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """See `LayerOps.norm`; x may have more dimensions."""
        if not x.shape[0]:
            return x
        if x.dtype == torch.float32:
            scaled = x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            return torch.mul(scaled, weight, out=scaled if out is None else out)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, eps)
        return torch.mul(weight, normed.to(x.dtype), out=out)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `LayerOps.add_norm`."""
        total = residual + x
        return total, self.norm(total, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `LayerOps.swiglu`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def clamped_swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        """See `LayerOps.clamped_swiglu`."""
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(SWISH_SLOPE * gate) * (up + 1)

    def rope_table(self, positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> RopeTable:
        """See `LayerOps.rope_table`."""
        angles = positions[:, None].float() * inverse
        cos, sin = angles.cos() * factor, angles.sin() * factor
        signed = torch.cat((-sin, sin), dim=-1)
        return RopeTable(torch.cat((cos, cos), dim=-1)[:, None].to(dtype), signed[:, None].to(dtype))

    def rope(
        self,
        heads: Sequence[Tensor],
        table: RopeTable,
        norms: Sequence[Tensor] = (),
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> None:
        """See `LayerOps.rope`."""
        for x, weight in zip_longest(heads, norms):
            _rotate(x if weight is None else self.norm(x, weight, eps), table, interleaved, x)

    def embed(self, token_ids: Tensor, table: Table, first: int | None) -> Tensor:
        """See `LayerOps.embed`."""
        table = plain_table(table)
        if first is None:
            return F.embedding(token_ids, table)
        local = token_ids - first
        outside = (local < 0) | (local >= table.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), table)
        return rows.masked_fill_(outside[:, None], 0)

    def sum_of_places(self, found: Tensor, places: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
        """See `LayerOps.sum_of_places`."""
        rows = torch.where((places < stops[-1])[..., None], found[places], 0)
        return torch.bmm(weights.to(found.dtype)[:, None], rows).squeeze(1)


def _rotate(x: Tensor, table: RopeTable, interleaved: bool, out: Tensor) -> None:
    """Rotate heads x [T, H, D] into `out` of the same shape, which may be x."""
    if not x.shape[0]:
        return
    dim = table.cos.shape[-1]
    part = x[..., :dim]
    if interleaved:
        part = part.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # type: ignore[no-untyped-call]
    torch.addcmul(part * table.cos, part.roll(dim // 2, -1), table.sin, out=out[..., :dim])
    if out is not x and dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]
