"""A decoder: embedding, layers of attention and MLP, final norm, logits.

It owns the order of the layers and their names on the hub; it knows its weights only as what a loader
gives, and other ranks not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import Attend, Provided
from longspan.models.gqa import GroupedQueryAttention
from longspan.models.layers import RMSNorm, embed, table_product
from longspan.models.mla import MultiHeadLatentAttention
from longspan.models.mlp import GatedMLP
from longspan.models.moe import MixtureOfExperts
from longspan.models.params import Param
from longspan.models.rope import Rotary

_EMBEDDING = "model.embed_tokens.weight"


def build_attention(
    config: ModelConfig, layer: int, prefix: str, given: Provided
) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """A layer's attention, of the kind the configuration asks for."""
    kind = MultiHeadLatentAttention if config.mla else GroupedQueryAttention
    return kind(config, layer, prefix, given)


class _Layer:
    def __init__(self, config: ModelConfig, layer: int, given: Provided) -> None:
        prefix, moe = f"model.layers.{layer}", config.moe
        self._attention = build_attention(config, layer, f"{prefix}.self_attn", given)
        self._mlp: GatedMLP | MixtureOfExperts
        if moe and layer in moe.layers:
            self._mlp = MixtureOfExperts(moe, config.hidden_size, f"{prefix}.{moe.block}", given)
        else:
            self._mlp = GatedMLP(config, f"{prefix}.mlp", given)
        self._before = _norm(config, f"{prefix}.input_layernorm.weight", given)
        self._between = _norm(config, f"{prefix}.post_attention_layernorm.weight", given)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self._attention(self._before(x), cos, sin, attend)
        return x + self._mlp(self._between(x))


class Embedding:
    """Token ids → hidden states: what comes before the first layer."""

    def __init__(self, config: ModelConfig, given: Provided) -> None:
        self._tp = given.tp
        self._first_token, _ = given.loader.extent("vocab", config.vocab_size)
        self._table = _table(config, _EMBEDDING, given)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 token_ids [T] → [T, hidden]."""
        return self._tp.all_reduce(embed(token_ids, self._table, self._first_token))


class Head:
    """Hidden states → logits: what comes after the last layer."""

    def __init__(self, config: ModelConfig, given: Provided) -> None:
        self._tp = given.tp
        self._norm = _norm(config, "model.norm.weight", given)
        self._table = _table(config, _EMBEDDING if config.tie_word_embeddings else "lm_head.weight", given)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → fp32 logits [R, vocab]."""
        return self._tp.all_gather_last(table_product(self._norm(hidden), self._table).float())


class DecoderModel:
    """A decoder, or the run of its layers that its loader gives, with the ends that belong to them."""

    def __init__(self, config: ModelConfig, given: Provided, dtype: torch.dtype) -> None:
        first, stop = given.loader.extent("layers", config.num_layers)
        self.hidden_size = config.hidden_size
        self.dtype = dtype
        self.embedding = Embedding(config, given) if first == 0 else None
        self._layers = [_Layer(config, layer, given) for layer in range(first, stop)]
        self.head = Head(config, given) if stop == config.num_layers else None
        self._rotary = Rotary(config.rope, config.rotary_dim, dtype, given.loader.device)

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] of tokens at int64 positions [T] through the layers held here."""
        cos, sin = self._rotary.table(positions)
        for layer in self._layers:
            x = layer(x, cos, sin, attend)
        return x


def _table(config: ModelConfig, name: str, given: Provided) -> Tensor:
    return given.loader.load(Param(name, (config.vocab_size, config.hidden_size), ("vocab", None)))


def _norm(config: ModelConfig, name: str, given: Provided) -> RMSNorm:
    return RMSNorm(given.loader.load(Param(name, (config.hidden_size,), (None,))), config.rms_norm_eps)
