"""A decoder: embedding, layers of attention and MLP, final norm, logits.

It owns the order of the layers and their names on the hub; it knows its weights only as what a loader
gives, and other ranks not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import Attend, LayerContext
from longspan.models.gqa import GroupedQueryAttention
from longspan.models.layers import RMSNorm, embed, table_product
from longspan.models.mla import MultiHeadLatentAttention
from longspan.models.mlp import GatedMLP
from longspan.models.moe import MixtureOfExperts
from longspan.models.params import Param
from longspan.models.rope import Rotary

_EMBEDDING = "model.embed_tokens.weight"


def build_attention(
    config: ModelConfig, layer: int, prefix: str, context: LayerContext
) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """A layer's attention, of the kind the configuration asks for."""
    kind = MultiHeadLatentAttention if config.mla else GroupedQueryAttention
    return kind(config, layer, prefix, context)


class _Layer:
    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        prefix, moe = f"model.layers.{layer}", config.moe
        self._attention = build_attention(config, layer, f"{prefix}.self_attn", context)
        self._mlp: GatedMLP | MixtureOfExperts
        if moe and layer in moe.layers:
            self._mlp = MixtureOfExperts(moe, config.hidden_size, f"{prefix}.{moe.block}", context)
        else:
            self._mlp = GatedMLP(config, f"{prefix}.mlp", context)
        self._before = _norm(config, f"{prefix}.input_layernorm.weight", context)
        self._between = _norm(config, f"{prefix}.post_attention_layernorm.weight", context)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self._attention(self._before(x), cos, sin, attend)
        return x + self._mlp(self._between(x))


class Embedding:
    """Token ids → hidden states: what comes before the first layer."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        self._tp = context.tp
        self._first_token, _ = context.loader.extent("vocab", config.vocab_size)
        self._table = _table(config, _EMBEDDING, context)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 token_ids [T] → [T, hidden]."""
        return self._tp.all_reduce(embed(token_ids, self._table, self._first_token))


class Head:
    """Hidden states → logits: what comes after the last layer."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        self._tp = context.tp
        self._norm = _norm(config, "model.norm.weight", context)
        self._table = _table(config, _EMBEDDING if config.tie_word_embeddings else "lm_head.weight", context)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → fp32 logits [R, vocab]."""
        return self._tp.all_gather_last(table_product(self._norm(hidden), self._table).float())


class DecoderModel:
    """A decoder, or the run of its layers that its loader gives, with the ends that belong to them."""

    def __init__(self, config: ModelConfig, context: LayerContext, dtype: torch.dtype) -> None:
        first, stop = context.loader.extent("layers", config.num_layers)
        self.hidden_size = config.hidden_size
        self.dtype = dtype
        self.embedding = Embedding(config, context) if first == 0 else None
        self._layers = [_Layer(config, layer, context) for layer in range(first, stop)]
        self.head = Head(config, context) if stop == config.num_layers else None
        self._rotary = Rotary(config.rope, config.rotary_dim, dtype, context.loader.device)

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] of tokens at int64 positions [T] through the layers held here."""
        cos, sin = self._rotary.table(positions)
        for layer in self._layers:
            x = layer(x, cos, sin, attend)
        return x


def _table(config: ModelConfig, name: str, context: LayerContext) -> Tensor:
    return context.loader.load(Param(name, (config.vocab_size, config.hidden_size), ("vocab", None)))


def _norm(config: ModelConfig, name: str, context: LayerContext) -> RMSNorm:
    return RMSNorm(context.loader.load(Param(name, (config.hidden_size,), (None,))), config.rms_norm_eps)
