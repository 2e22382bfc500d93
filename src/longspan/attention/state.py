"""The algebra of attention (idea 3): attention states and their merge.

It owns `AttentionState` and its associative, commutative merge; it must not know where states come
from or how they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionState:
    """Attention over part of the keys.

    out [T, H, D] is the softmax-weighted mean of the values seen, lse [T, H] (natural log) the log-sum-exp of
    the scores; both fp32 (or fp64) whatever the model's dtype. Nothing seen is (0, -inf), the identity of `merge`.
    Backends hand over nothing else for an empty side: no NaN, no +inf (see `normalised`).
    """

    out: Tensor
    lse: Tensor

    @staticmethod
    def empty(tokens: int, heads: int, head_dim: int, like: Tensor) -> AttentionState:
        """The identity for `tokens` rows, on the device of `like`, in fp32 or wider."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return AttentionState(
            like.new_zeros(tokens, heads, head_dim, dtype=dtype),
            like.new_full((tokens, heads), float("-inf"), dtype=dtype),
        )

    @staticmethod
    def normalised(out: Tensor, lse: Tensor) -> AttentionState:
        """The state of a kernel that may return garbage, NaN or +inf for rows that see nothing."""
        lse = torch.where(torch.isfinite(lse), lse, float("-inf"))
        return AttentionState(torch.where(torch.isneginf(lse)[..., None], 0.0, out), lse)

    def columns(self, dim: int) -> AttentionState:
        """The first `dim` elements of `out`: the values of a cache whose rows are longer (MLA's latents)."""
        return self if dim == self.out.shape[-1] else AttentionState(self.out[..., :dim], self.lse)


def merge(parts: Sequence[AttentionState]) -> AttentionState:
    """The state over the union of what `parts` saw (disjoint keys, equal shapes).

    w = softmax(lse) over the parts; out = Σ w·out; lse = log Σ exp lse: the online-softmax merge of
    Milakov & Gimelshein (2018) and FlashAttention. A part of weight 0 is skipped, not multiplied.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    weights = torch.softmax(lse, 0).nan_to_num_(0.0)[..., None]  # NaN where no part saw anything
    outs = torch.stack([part.out for part in parts])
    return AttentionState(torch.where(weights > 0, outs, 0.0).mul_(weights).sum(0), torch.logsumexp(lse, 0))


def with_sink(part: AttentionState, sink: Tensor) -> AttentionState:
    """`part` merged with the state (0, sink): sink [H] is a score without a value (StreamingLLM, 2023; gpt-oss)."""
    sink = sink.to(part.lse.dtype)
    out = part.out * torch.sigmoid(part.lse - sink)[..., None]
    return AttentionState(out, torch.logaddexp(part.lse, sink.expand_as(part.lse)))


def concatenate(parts: Sequence[AttentionState]) -> AttentionState:
    """Rows of `parts` one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return AttentionState(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
