"""A small model of the same vocabulary, as what drafts tokens for another one.

It owns the fit of a whole model to the interface of a draft module; the model is one of a family.
"""

from __future__ import annotations

from torch import Tensor

from longspan.errors import ModelError
from longspan.models.context import Attend, Model


class SmallModel:
    """See `DraftModule`. The hidden states of the model that it drafts for are not used.

    Its row p is that of the token at position p + 1, so it drafts in the first run, from the tokens that were just
    sampled. It never sees the first token of a text.
    """

    def __init__(self, model: Model, own_tokens: int, tokens: int) -> None:
        """`own_tokens` and `tokens` are the sizes of its vocabulary and of that of the model that it drafts for.

        They differ where the tables are padded; the tokens are the same.
        """
        if model.embedding is None or model.head is None:
            raise ModelError("a model that drafts is built whole; its family must give it an embedding and a head")
        self._model, self._embedding, self._output = model, model.embedding, model.head
        self._own_tokens, self._tokens = own_tokens, tokens

    def first_input(self, hidden: Tensor, observed: Tensor | None) -> Tensor:
        """See `DraftModule.first_input`."""
        return hidden

    def layers(self, next_ids: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `DraftModule.layers`."""
        if self._own_tokens < self._tokens:
            next_ids = next_ids.clamp(max=self._own_tokens - 1)
        return self._model.layers(self._embedding(next_ids), positions, attend)

    def head(self, hidden: Tensor) -> Tensor:
        """See `DraftModule.head`. Tokens that the model that it drafts for lacks are left out."""
        return self._output(hidden)[:, : self._tokens]
