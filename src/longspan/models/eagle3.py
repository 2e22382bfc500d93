"""A module that drafts from the hidden states of three layers (EAGLE-3; Li et al. 2025), in the published format.

It owns the reading of such a checkpoint's config.json and the module; it must not know how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ModelError, UnsupportedModel
from longspan.models.config import ModelConfig, read_config
from longspan.models.context import Attend, LayerContext
from longspan.models.decoder import Embedding, Head, hidden_norm
from longspan.models.fields import Fields
from longspan.models.gqa import GroupedQueryAttention
from longspan.models.mlp import GatedMLP
from longspan.models.params import Param
from longspan.models.rope import Rotary

EMBEDDING, JOIN, OFFSETS, MASK = "embed_tokens.weight", "fc.weight", "d2t", "t2d"
UNREAD = (MASK, "verifier_")  # tensors that are not needed
_LAYERS = ("midlayer", "layers.0")  # what the layer is called: by the paper's authors, and by vLLM
_LEAST_LAYERS = 7  # of a model whose layers 2, N/2 and N-3 are three


@dataclass(frozen=True)
class Eagle3Config:
    """The sizes of a module, and which of the tensors that a checkpoint may lack it has."""

    # its layer; `vocab_size` is that of its head
    layer: ModelConfig
    # name of the layer in the checkpoint
    name: str
    # width of the hidden states that it takes
    target_hidden: int
    # tokens in the vocabulary of the model that it drafts for
    target_tokens: int
    # whether it has an embedding of its own
    has_embedding: bool
    # whether it has offsets from its vocabulary to that of the model
    has_offsets: bool
    # whether the residual is what the norm over the hidden states gave, and not the hidden states
    norm_before_residual: bool


def observed_layers(num_layers: int) -> tuple[int, ...]:
    """The layers of a model of `num_layers` layers whose inputs are taken: 2, N/2 and N-3, counted from 0.

    So do the authors' code, SGLang's and vLLM's: each takes the hidden states as they enter these layers.
    """
    return (2, num_layers // 2, num_layers - 3) if num_layers >= _LEAST_LAYERS else ()


def parse(values: Mapping[str, Any], names: Collection[str], target: ModelConfig) -> Eagle3Config:
    """Read a config.json. `names` are the checkpoint's tensors; none where the weights are not opened.

    The sizes may be in `transformer_layer_config`, as the library `speculators` writes them. Raises `ModelError`.
    """
    inner = values.get("transformer_layer_config")
    nested = isinstance(inner, Mapping)
    fields = Fields(values)
    _check_observed(fields, target.num_layers)
    layer = read_config({**(inner if isinstance(inner, Mapping) else {}), **values}, "EAGLE-3")
    if layer.num_layers != 1:
        raise UnsupportedModel(
            f"config.json: num_hidden_layers={layer.num_layers} is not supported; use a module of one layer"
        )
    drafts = fields.size("draft_vocab_size", layer.vocab_size)
    return Eagle3Config(
        layer=replace(layer, vocab_size=drafts, tie_word_embeddings=False),
        name=next((name for name in _LAYERS if any(each.startswith(f"{name}.") for each in names)), _LAYERS[0]),
        target_hidden=fields.size("target_hidden_size", target.hidden_size),
        target_tokens=layer.vocab_size,
        has_embedding=EMBEDDING in names or (not names and layer.hidden_size != target.hidden_size),
        has_offsets=OFFSETS in names or drafts != layer.vocab_size,
        norm_before_residual=fields.flag("norm_before_residual", nested),
    )


def _check_observed(fields: Fields, num_layers: int) -> None:
    """Raise `UnsupportedModel` if the file names other layers than those that are taken.

    Engines read such a list differently: as layers whose inputs are taken, or those whose outputs are.
    """
    where = fields.inner("eagle_config") if fields.get("eagle_config") else fields
    named = where.get("eagle_aux_hidden_state_layer_ids")
    taken = list(observed_layers(num_layers))
    if named is not None and named not in (taken, [layer - 1 for layer in taken]):
        raise UnsupportedModel(
            f"config.json: eagle_aux_hidden_state_layer_ids={named!s:.80} is not supported for a model of {num_layers} "
            f"layers; use a module that takes what enters layers {taken}"
        )


class Eagle3Module:
    """See `DraftModule`. The first run takes the result of `first_input`, a later one that of the run before.

    With e the embedding of token p + 1 and g the joined rows of token p, the layer's attention sees both normed and
    side by side, and its output is added to g. Published modules return the sum before the last norm.
    """

    def __init__(
        self, config: Eagle3Config, context: LayerContext, dtype: torch.dtype,
        embedding: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        """`embedding` is that of the model, which is used where the module has none."""
        layer, name, linear = config.layer, config.name, context.loader.linear
        hidden, taken = layer.hidden_size, 3 * config.target_hidden
        if config.has_embedding:
            embedding = Embedding(replace(layer, vocab_size=config.target_tokens), context, EMBEDDING)
        self._embedding = embedding
        self._norm_before_residual = config.norm_before_residual
        self._rotary = Rotary(layer.rope, layer.rotary_dim, dtype, context)
        self._join = linear(Param(JOIN, (hidden, taken), (None, None)))
        self._embedding_norm = hidden_norm(layer, f"{name}.input_layernorm.weight", context)
        self._hidden_norm = hidden_norm(layer, f"{name}.hidden_norm.weight", context)
        self._attention = GroupedQueryAttention(layer, 0, f"{name}.self_attn", context, 2 * hidden)
        self._between = hidden_norm(layer, f"{name}.post_attention_layernorm.weight", context)
        self._mlp = GatedMLP(layer, f"{name}.mlp", context)
        self._norm = hidden_norm(layer, "norm.weight", context)
        self._head = Head(layer, context)
        self._tokens = config.target_tokens
        self._target_ids: Tensor | None = None  # of each token of the head, int64 [draft vocab]
        if config.has_offsets:  # whole numbers below 2^24, which fp32 holds
            offsets = context.loader.load(Param(OFFSETS, (layer.vocab_size,), (None,), exact=True)).long()
            self._target_ids = offsets + torch.arange(layer.vocab_size, device=offsets.device)

    def first_input(self, hidden: Tensor, observed: Tensor | None) -> Tensor:
        """See `DraftModule.first_input`: the rows of three layers, joined. Those after the last layer are not used."""
        if observed is None:
            raise ModelError("the model has kept no hidden states for its EAGLE-3 module")
        return self._join(observed)

    def layers(self, next_ids: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `DraftModule.layers`."""
        if self._embedding is None:
            raise ModelError("an EAGLE-3 module without an embedding is built with that of the model")
        embedded, before = self._embedding_norm(self._embedding(next_ids)), self._hidden_norm(hidden)
        residual = before if self._norm_before_residual else hidden
        both = torch.cat((embedded, before), dim=-1)
        attended = self._attention(both, self._rotary.table(positions), attend)
        residual, x = self._between.after_add(attended, residual)
        return residual + self._mlp(x).summed()

    def head(self, hidden: Tensor) -> Tensor:
        """See `DraftModule.head`. Tokens that the module lacks have a logit of -inf."""
        logits = self._head(self._norm(hidden))
        if self._target_ids is None:
            return logits
        return logits.new_full((len(logits), self._tokens), -torch.inf).index_copy_(1, self._target_ids, logits)
