"""A pre-norm decoder: embedding, layers of attention and MLP, final norm, logits.

It owns the order of the layers and the names of their parameters. It gets its weights from a loader, and must not know
about other ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.models.config import ModelConfig
from longspan.models.context import Attend, LayerContext
from longspan.models.gqa import GroupedQueryAttention
from longspan.models.layers import PartialSum, RMSNorm
from longspan.models.mla import MultiHeadLatentAttention
from longspan.models.mlp import GatedMLP
from longspan.models.moe import MixtureOfExperts
from longspan.models.ops.base import RopeTable
from longspan.models.params import Param
from longspan.models.rope import Rotary

_EMBEDDING = "model.embed_tokens.weight"


def build_attention(
    config: ModelConfig, layer: int, prefix: str, context: LayerContext
) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """The attention of a layer: grouped-query, or latent if the configuration has `mla`."""
    kind = MultiHeadLatentAttention if config.mla else GroupedQueryAttention
    return kind(config, layer, prefix, context)


class DecoderLayer:
    """Attention and an MLP or a mixture, each behind a norm and with a residual.

    What a part computes is added to the residual by the next norm, so that both are one operation.
    """

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        prefix, moe = f"model.layers.{layer}", config.moe
        self._attention = build_attention(config, layer, f"{prefix}.self_attn", context)
        self._mlp: GatedMLP | MixtureOfExperts
        if moe and config.has_mixture(layer):
            self._mlp = MixtureOfExperts(moe, config.hidden_size, f"{prefix}.{moe.block}", context)
        else:
            self._mlp = GatedMLP(config, f"{prefix}.mlp", context)
        self._before = hidden_norm(config, f"{prefix}.input_layernorm.weight", context)
        self._between = hidden_norm(config, f"{prefix}.post_attention_layernorm.weight", context)

    def __call__(
        self, x: Tensor, added: PartialSum | None, table: RopeTable, attend: Attend
    ) -> tuple[Tensor, PartialSum]:
        """Hidden states, as x [T, hidden] to which `added` [T, hidden] is to be added → the same; None: x is all."""
        x, normed = (x, self._before(x)) if added is None else self._before.after_add(added, x)
        x, normed = self._between.after_add(self._attention(normed, table, attend), x)
        return x, self._mlp(normed)


class Embedding:
    """The embedding, before the first layer, with this rank's part of the vocabulary."""

    def __init__(self, config: ModelConfig, context: LayerContext, name: str = _EMBEDDING) -> None:
        self._tp = context.tp
        self._ops = context.ops
        first, stop = context.loader.extent("vocab", config.vocab_size)
        self._first_token = None if stop - first == config.vocab_size else first
        self._table = context.loader.table(_table(config, name), config.tie_word_embeddings)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 token_ids [T] → [T, hidden]."""
        return self._tp.all_reduce(self._ops.embed(token_ids, self._table, self._first_token))


class Head:
    """The output head, after the final norm."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        self._tp = context.tp
        name = _EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        self._product = context.loader.linear(_table(config, name))

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [T, hidden] → logits [T, vocab] of the whole vocabulary, in the same dtype."""
        return self._tp.all_gather_last(self._product(hidden))


class DecoderModel:
    """A decoder, or the part of one on a pipeline stage: see `Model`."""

    def __init__(self, config: ModelConfig, context: LayerContext, dtype: torch.dtype) -> None:
        first, stop = context.loader.extent("layers", config.num_layers)
        self.hidden_size = config.hidden_size
        self.dtype = dtype
        self.embedding = Embedding(config, context) if first == 0 else None
        self._layers = [DecoderLayer(config, layer, context) for layer in range(first, stop)]
        self._norm: RMSNorm | None = None
        self.head: Head | None = None
        self.draft_module: NextTokenModule | None = None
        self._observed_layers = config.observed_layers
        # what these layers took in the last call of `layers` [T, observed layers · hidden]; None without any
        self.observed: Tensor | None = None
        self._rotary = Rotary(config.rope, config.rotary_dim, dtype, context)
        if stop == config.num_layers:
            self._norm = hidden_norm(config, "model.norm.weight", context)
            self.head = Head(config, context)
            if config.loaded_draft_layers:
                embedding = self.embedding or Embedding(config, context)
                self.draft_module = NextTokenModule(config, context, embedding, self.head, self._rotary)

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `Model.layers`. After the last layer of the model comes the final norm."""
        table = self._rotary.table(positions)
        added: PartialSum | None = None
        taken: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            if number in self._observed_layers:
                x, added = _total(x, added), None
                taken.append(x)
            x, added = layer(x, added, table, attend)
        self.observed = torch.cat(taken, dim=-1) if taken else None
        if self._norm is None:
            return _total(x, added)
        return self._norm(x) if added is None else self._norm.after_add(added, x)[1]


class NextTokenModule:
    """A module for multi-token prediction (DeepSeek-V3, 2024, eqs. 21-23): see `DraftModule`.

    The hidden states that it takes are those after the model's final norm, as in vLLM's and SGLang's implementations;
    the paper says only "the representation given by the main model". What it returns, before its own norm, is what its
    next run takes, as in vLLM. Embedding and output head are the model's own: the paper shares them, and checkpoints
    repeat them as the module's `embed_tokens` and `shared_head.head`, which are not read.
    """

    def __init__(
        self, config: ModelConfig, context: LayerContext, embedding: Embedding, head: Head, rotary: Rotary
    ) -> None:
        layer, hidden = config.num_layers, config.hidden_size
        prefix = f"model.layers.{layer}"
        self._embedding = embedding
        self._head = head
        self._rotary = rotary
        self._embedding_norm = hidden_norm(config, f"{prefix}.enorm.weight", context)
        self._hidden_norm = hidden_norm(config, f"{prefix}.hnorm.weight", context)
        self._join = context.loader.linear(Param(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), (None, None)))
        self._layer = DecoderLayer(config, layer, context)
        self._norm = hidden_norm(config, f"{prefix}.shared_head.norm.weight", context)

    def first_input(self, hidden: Tensor, observed: Tensor | None) -> Tensor:
        """See `DraftModule.first_input`."""
        return hidden

    def layers(self, next_ids: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `DraftModule.layers`."""
        embedded, before = self._embedding_norm(self._embedding(next_ids)), self._hidden_norm(hidden)
        joined = self._join(torch.cat((embedded, before), dim=-1))
        return _total(*self._layer(joined, None, self._rotary.table(positions), attend))

    def head(self, hidden: Tensor) -> Tensor:
        """See `DraftModule.head`."""
        return self._head(self._norm(hidden))


def _total(x: Tensor, added: PartialSum | None) -> Tensor:
    """Hidden states [T, hidden], of which a part is to be added."""
    return x if added is None else x + added.summed()


def _table(config: ModelConfig, name: str) -> Param:
    """A table [vocab, hidden] with a row for each token of the vocabulary."""
    return Param(name, (config.vocab_size, config.hidden_size), ("vocab", None))


def hidden_norm(config: ModelConfig, name: str, context: LayerContext) -> RMSNorm:
    """A norm over the hidden states."""
    weight = context.loader.load(Param(name, (config.hidden_size,), (None,)))
    return RMSNorm(context.ops, weight, config.rms_norm_eps)
