"""A decoder: embedding, layers of attention and MLP, final norm, logits.

It owns the order of the layers and their names on the hub; it knows its weights only as what a loader
gives, and other ranks not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import Attend, Loader, TensorParallel
from longspan.models.gqa import GroupedQueryAttention, gqa_params
from longspan.models.layers import RMSNorm, embed, table_product
from longspan.models.mla import MultiHeadLatentAttention, mla_params
from longspan.models.mlp import GatedMLP, mlp_params
from longspan.models.moe import MixtureOfExperts, moe_params
from longspan.models.params import Param
from longspan.models.rope import Rotary


def _layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}"


def _norm_param(config: ModelConfig, name: str) -> Param:
    return Param(name, (config.hidden_size,), (None,))


def _embedding_param(config: ModelConfig) -> Param:
    return Param("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), ("vocab", None))


def _head_param(config: ModelConfig) -> Param:
    if config.tie_word_embeddings:
        return _embedding_param(config)
    return Param("lm_head.weight", (config.vocab_size, config.hidden_size), ("vocab", None))


def decoder_params(config: ModelConfig) -> list[Param]:
    """Every tensor the model needs of a checkpoint."""
    params = [_embedding_param(config), _norm_param(config, "model.norm.weight")]
    if not config.tie_word_embeddings:
        params.append(_head_param(config))
    for layer in range(config.num_layers):
        prefix = _layer_prefix(layer)
        attention = mla_params if config.mla else gqa_params
        params += attention(config, f"{prefix}.self_attn").values()
        moe = config.moe
        if moe and layer in moe.layers:
            params += moe_params(moe, config.hidden_size, f"{prefix}.{moe.block}").values()
        else:
            params += mlp_params(config, f"{prefix}.mlp").values()
        params.append(_norm_param(config, f"{prefix}.input_layernorm.weight"))
        params.append(_norm_param(config, f"{prefix}.post_attention_layernorm.weight"))
    return params


class _Layer:
    def __init__(self, config: ModelConfig, layer: int, loader: Loader, tp: TensorParallel) -> None:
        prefix, eps = _layer_prefix(layer), config.rms_norm_eps
        attention = MultiHeadLatentAttention if config.mla else GroupedQueryAttention
        self._attention = attention(config, layer, f"{prefix}.self_attn", loader, tp)
        moe = config.moe
        self._mlp: GatedMLP | MixtureOfExperts
        if moe and layer in moe.layers:
            self._mlp = MixtureOfExperts(moe, config.hidden_size, f"{prefix}.{moe.block}", loader, tp)
        else:
            self._mlp = GatedMLP(config, f"{prefix}.mlp", loader, tp)
        self._before = RMSNorm(loader.load(_norm_param(config, f"{prefix}.input_layernorm.weight")), eps)
        self._between = RMSNorm(loader.load(_norm_param(config, f"{prefix}.post_attention_layernorm.weight")), eps)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self._attention(self._before(x), cos, sin, attend)
        return x + self._mlp(self._between(x))


class DecoderModel:
    """A decoder on the slices its loader gives."""

    def __init__(self, config: ModelConfig, loader: Loader, tp: TensorParallel, dtype: torch.dtype) -> None:
        self.config = config
        self._tp = tp
        self._first_token, _ = loader.extent("vocab", config.vocab_size)
        self._embedding = loader.load(_embedding_param(config))
        self._layers = [_Layer(config, layer, loader, tp) for layer in range(config.num_layers)]
        self._norm = RMSNorm(loader.load(_norm_param(config, "model.norm.weight")), config.rms_norm_eps)
        self._head = loader.load(_head_param(config))
        self._rotary = Rotary(config.rope, config.rotary_dim, dtype)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] after the final norm, of int64 token_ids [T] at positions [T]."""
        cos, sin = self._rotary.table(positions)
        x = self._tp.all_reduce(embed(token_ids, self._embedding, self._first_token))
        for layer in self._layers:
            x = layer(x, cos, sin, attend)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [R, vocab] of hidden states [R, hidden]."""
        return self._tp.all_gather_last(table_product(hidden, self._head).float())
