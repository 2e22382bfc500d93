"""What latent attention brings along: the per-head form of a step's rows, and the way from results to values.

It owns the interface; attention decides when a form is used, a model what the forms are.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Expansion(Protocol):
    """The per-head form of this step's latents, made when asked for."""

    value_dim: int

    def heads(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [L, Hq, Dq] and v [L, Hq, Dv] of the step's rows [start, stop)."""
        ...

    def values(self, latents: Tensor) -> Tensor:
        """Results [T, Hq, latent] as values [T, Hq, Dv], in the dtype they came in."""
        ...
