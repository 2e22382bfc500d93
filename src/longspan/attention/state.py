"""Attention states and their merge (idea 3 of docs/architecture.md).

It owns `AttentionState` and its associative, commutative merge; it must not know where states come from, nor how they
are sent between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionState:
    """The result of attention over some of the keys.

    Both tensors are fp32 (or fp64), whatever the model's dtype, but for `out` of a state that will not be merged: it
    may have the dtype of the model. A row that sees no key has out 0 and lse -inf, which is
    the identity of `merge`. Backends never return NaN or +inf for such a row: see `normalised`.
    """

    # [T, Hq, Dv]: mean of the values, weighted by the softmax of the scores
    out: Tensor
    # [T, Hq]: natural logarithm of the sum of the exponentials of the scores
    lse: Tensor

    @staticmethod
    def empty(tokens: int, heads: int, head_dim: int, like: Tensor) -> AttentionState:
        """The identity [tokens, heads, head_dim], on the device of `like`, in fp32 or the wider dtype of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return AttentionState(
            like.new_zeros(tokens, heads, head_dim, dtype=dtype),
            like.new_full((tokens, heads), float("-inf"), dtype=dtype),
        )

    @staticmethod
    def normalised(out: Tensor, lse: Tensor) -> AttentionState:
        """The state from a kernel's out [T, Hq, Dv] and natural lse [T, Hq].

        An lse that is not finite marks a row that sees no key, whatever the kernel wrote to `out`.
        """
        lse = torch.where(torch.isfinite(lse), lse, float("-inf"))
        return AttentionState(torch.where(torch.isneginf(lse)[..., None], 0.0, out), lse)

    def columns(self, dim: int) -> AttentionState:
        """The state with only the first `dim` elements of `out`, for caches whose rows are wider than values (MLA)."""
        return self if dim == self.out.shape[-1] else AttentionState(self.out[..., :dim], self.lse)


def merge(parts: Sequence[AttentionState]) -> AttentionState:
    """The state over the union of the keys of `parts`, which must be disjoint; all parts have the same shape.

    w = softmax(lse) over the parts; out = Σ w · out; lse = log Σ exp(lse). This is the merge of online softmax (Milakov
    & Gimelshein 2018) and of FlashAttention. A part of weight 0 is skipped, because 0 · NaN is NaN.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    weights = torch.softmax(lse, 0).nan_to_num_(0.0)[..., None]  # NaN where no part saw a key
    outs = torch.stack([part.out for part in parts])
    return AttentionState(torch.where(weights > 0, outs, 0.0).mul_(weights).sum(0), torch.logsumexp(lse, 0))


def with_sink(part: AttentionState, sink: Tensor) -> AttentionState:
    """`part` merged with the state (0, sink), in closed form.

    sink [Hq] is a score without a value, learned for each head (StreamingLLM, 2023; gpt-oss).
    """
    sink = sink.to(part.lse.dtype)
    out = part.out * torch.sigmoid(part.lse - sink)[..., None]
    return AttentionState(out, torch.logaddexp(part.lse, sink.expand_as(part.lse)))


def concatenate(parts: Sequence[AttentionState]) -> AttentionState:
    """The rows of all parts as one state, in order."""
    if len(parts) == 1:
        return parts[0]
    return AttentionState(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
