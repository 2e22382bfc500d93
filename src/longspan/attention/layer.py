"""What attention must know of a layer: its place in the pool, and the latent space its cache may be in.

It owns these interfaces; a model makes them, attention decides when which form is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Latent(Protocol):
    """A layer whose cache rows are latents (MLA), and the linear maps between them and its heads.

    A model's own query is [T, Hq, Dq]; scores are the same whether queries are absorbed or rows expanded.
    """

    value_dim: int

    def absorb(self, q: Tensor) -> Tensor:
        """Queries [T, Hq, Dq] in the space of the cache's rows: [T, Hq, D]."""
        ...

    def expand(self, rows: Tensor) -> Tensor:
        """Cache rows [T, D] as every head's keys and values [2, Hq, T, Dq]; values fill the first `value_dim`."""
        ...

    def values(self, latents: Tensor) -> Tensor:
        """Results [T, Hq, latent] as values [T, Hq, value_dim], in the dtype they came in."""
        ...


@dataclass(frozen=True)
class AttentionLayer:
    """One layer: its number in the model, how many positions a row sees with its own (None: all), and what few have.

    `sink` [Hq] is a score without a value that every row's softmax counts in (gpt-oss).
    """

    index: int
    window: int | None = None
    sink: Tensor | None = None
    latent: Latent | None = None
