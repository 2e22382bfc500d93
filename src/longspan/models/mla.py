"""Multi-head latent attention of one layer (DeepSeek-V2, 2024), absorbed or expanded.

It owns the projections between hidden states, queries and cache rows. Attention itself is passed in by the caller. It
sees one KV head, whose rows are latent and rotary key, so every schedule that serves multi-query attention serves MLA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.config import MLAConfig, ModelConfig
from longspan.models.context import Attend, LayerContext, Linear
from longspan.models.layers import PartialSum, RMSNorm
from longspan.models.ops.base import RopeTable
from longspan.models.params import Param

_LATENT_NORM_EPS = 1e-6  # of the two norms inside MLA; `rms_norm_eps` is that of the other norms


class MultiHeadLatentAttention:
    """The attention of one layer, on the query heads that its loader gives. The latent is computed on every rank."""

    def __init__(self, config: ModelConfig, layer: int, prefix: str, context: LayerContext) -> None:
        if config.mla is None:
            raise TypeError("latent attention needs ModelConfig.mla")
        mla, hidden, heads, latent = config.mla, config.hidden_size, config.num_q_heads, config.mla.kv_lora_rank
        query, expanded, rank = mla.query_dim + mla.rope_dim, mla.query_dim + mla.value_dim, mla.q_lora_rank
        load, linear = context.loader.load, context.loader.linear
        self._mla = mla
        self._tp = context.tp
        self._ops = context.ops
        start, stop = context.loader.extent("q_heads", heads)
        self._heads = stop - start
        self._q_a: Linear | None = None
        self._q_norm: RMSNorm | None = None
        if rank is None:
            self._q = linear(Param(f"{prefix}.q_proj.weight", (heads * query, hidden), ("q_heads", None), query))
        else:
            self._q_a = linear(Param(f"{prefix}.q_a_proj.weight", (rank, hidden), (None, None)))
            norm = load(Param(f"{prefix}.q_a_layernorm.weight", (rank,), (None,)))
            self._q_norm = RMSNorm(context.ops, norm, _LATENT_NORM_EPS)
            self._q = linear(Param(f"{prefix}.q_b_proj.weight", (heads * query, rank), ("q_heads", None), query))
        self._kv_a = linear(Param(f"{prefix}.kv_a_proj_with_mqa.weight", (latent + mla.rope_dim, hidden), (None, None)))
        norm = load(Param(f"{prefix}.kv_a_layernorm.weight", (latent,), (None,)))
        self._kv_norm = RMSNorm(context.ops, norm, _LATENT_NORM_EPS)
        kv_b = load(Param(f"{prefix}.kv_b_proj.weight", (heads * expanded, latent), ("q_heads", None), expanded))
        expand = kv_b.view(self._heads, expanded, latent)
        self._layer = AttentionLayer(
            layer, config.window(layer), latent=LatentSpace(mla, expand[:, : mla.query_dim], expand[:, mla.query_dim :])
        )
        width = heads * mla.value_dim
        self._o = linear(Param(f"{prefix}.o_proj.weight", (hidden, width), (None, "q_heads"), mla.value_dim))

    def __call__(self, x: Tensor, table: RopeTable, attend: Attend) -> PartialSum:
        """x [T, hidden] → [T, hidden]."""
        row, queries = self._kv_a(x)[:, None], self._queries(x)
        latent, key = row.tensor_split([self._mla.kv_lora_rank], dim=-1)
        self._kv_norm(latent[:, 0], out=latent[:, 0])
        # interleaved pairs are reordered in queries and keys alike, so their products do not change
        self._ops.rope((queries[..., self._mla.query_dim :], key), table, interleaved=self._mla.interleaved)
        values = attend(self._layer, queries, row, row)
        out = values.reshape(x.shape[0], self._heads * self._mla.value_dim)
        return PartialSum(self._tp, self._o(out))

    def _queries(self, x: Tensor) -> Tensor:
        """x [T, hidden] → queries [T, Hq, query_dim + rope_dim] before rope, of which the first part stays as it is."""
        if self._q_a and self._q_norm:
            x = self._q_norm(self._q_a(x))
        return self._q(x).view(x.shape[0], self._heads, self._mla.query_dim + self._mla.rope_dim)


class LatentSpace:
    """The linear maps of one layer's heads between latents, keys and values: see `Latent`.

    `to_key` is [Hq, query_dim, kv_lora_rank], `to_value` [Hq, value_dim, kv_lora_rank].
    """

    def __init__(self, mla: MLAConfig, to_key: Tensor, to_value: Tensor) -> None:
        self.value_dim = mla.value_dim
        self._mla = mla
        self._to_key, self._to_value = to_key, to_value

    def absorb(self, q: Tensor) -> Tensor:
        """See `Latent.absorb`: q [T, Hq, query_dim + rope_dim] → [T, Hq, kv_lora_rank + rope_dim]."""
        plain, rotary = q.tensor_split([self._mla.query_dim], dim=-1)
        return torch.cat((torch.bmm(plain.transpose(0, 1), self._to_key).transpose(0, 1), rotary), dim=-1)

    def expand(self, rows: Tensor) -> Tensor:
        """See `Latent.expand`: rows [T, kv_lora_rank + rope_dim] → [2, Hq, T, query_dim + rope_dim]."""
        mla, heads = self._mla, self._to_key.shape[0]
        latent, rotary = rows.tensor_split([mla.kv_lora_rank], dim=-1)
        expanded = rows.new_empty(2, heads, len(rows), mla.query_dim + mla.rope_dim)
        expanded[0, ..., : mla.query_dim] = latent @ self._to_key.transpose(1, 2)
        expanded[0, ..., mla.query_dim :] = rotary
        expanded[1, ..., : mla.value_dim] = latent @ self._to_value.transpose(1, 2)
        expanded[1, ..., mla.value_dim :] = 0
        return expanded

    def values(self, latents: Tensor) -> Tensor:
        """See `Latent.values`: latents [T, Hq, kv_lora_rank] → [T, Hq, value_dim]."""
        heads_first = latents.to(self._to_value.dtype).transpose(0, 1)
        return torch.bmm(heads_first, self._to_value.transpose(1, 2)).transpose(0, 1).to(latents.dtype)
