"""What attention knows of a layer: its number, its window, its sink, and the latent space of its cache.

It owns these interfaces. A model implements them, and attention decides when latents are absorbed or expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Latent(Protocol):
    """The linear maps between the cached latents of a layer (MLA) and its heads.

    Scores are the same whether queries are absorbed or rows are expanded.
    """

    # elements of a head's value
    value_dim: int

    def absorb(self, q: Tensor) -> Tensor:
        """Map queries [T, Hq, Dq] to the space of cached rows: [T, Hq, D]."""
        ...

    def expand(self, rows: Tensor) -> Tensor:
        """Map cached rows [T, D] to every head's keys and values [2, Hq, T, Dq].

        Values are the first `value_dim` elements; the other elements are 0.
        """
        ...

    def values(self, latents: Tensor) -> Tensor:
        """Map results [T, Hq, latent width] to values [T, Hq, value_dim], in the dtype of the results."""
        ...


@dataclass(frozen=True)
class AttentionLayer:
    """One layer, as attention knows it."""

    # number in the model
    index: int
    # positions visible to a token, its own included; None for full attention
    window: int | None = None
    # [Hq]: a score without a value that is part of every row's softmax (gpt-oss)
    sink: Tensor | None = None
    # the latent space of the layer's cache; None if it has keys and values
    latent: Latent | None = None
