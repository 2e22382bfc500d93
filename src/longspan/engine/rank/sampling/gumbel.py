"""Sample many rows at once, without reading anything back from the device.

It owns the batched form of temperature, top-k, top-p, min-p and Gumbel sampling in plain PyTorch, for devices without
the kernels of `kernels.py`. Its reference is the sampler's code for one row, which on a CPU is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.attention.host_copy import to_device
from longspan.engine.rank.sampling.random_numbers import hashed, mixed, uniform
from longspan.engine.rank.sampling.rows import GREEDY_BELOW
from longspan.request import SamplingParams

_EVERYTHING = 1 << 31  # a top-k that keeps every token


@dataclass(frozen=True)
class DrawParameters:
    """How R rows are drawn, on the device: they change only when the rows do."""

    # int64 [5, R], whose rows are the properties below; floats as their bits
    table: Tensor
    # whether any row has top-k, top-p or min-p
    filters: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device) -> DrawParameters:
        """The parameters of rows with these sampling parameters and seeds, in one copy to the device."""
        table, filtered = draw_table(params, seeds)
        return DrawParameters(to_device(torch.from_numpy(table), device), bool(filtered.any()))

    @property
    def hashes(self) -> Tensor:
        """Int64 [R]: the hashed seeds."""
        return self.table[0]

    @property
    def top_k(self) -> Tensor:
        """Int64 [R]; 2^31 for all tokens."""
        return self.table[1]

    @property
    def temperature(self) -> Tensor:
        """Fp32 [R]; 0 is greedy."""
        return self.table[2].view(torch.float64).float()

    @property
    def top_p(self) -> Tensor:
        """Fp64 [R]; 2 for all tokens."""
        return self.table[3].view(torch.float64)

    @property
    def floor(self) -> Tensor:
        """Fp32 [R]: the logarithm of min-p."""
        return self.table[4].view(torch.float64).float()


def draw_table(params: Sequence[SamplingParams], seeds: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(`DrawParameters.table` [5, R], whether a row is drawn with top-k, top-p or min-p [R]), on the host."""
    temperatures = np.array([one.temperature for one in params])
    shares = np.array([one.top_p for one in params])
    lowest = [one.min_p for one in params]
    kept = [one.top_k if one.top_k > 0 else _EVERYTHING for one in params]
    drawn, table = temperatures >= GREEDY_BELOW, np.empty((5, len(params)), dtype=np.int64)
    table[0], table[1] = hashed(seeds), kept
    table[2] = np.where(drawn, temperatures, 0.0).view(np.int64)
    table[3] = np.where(shares < 1.0, shares, 2.0).view(np.int64)  # no filter: the mass may exceed 1 by rounding
    table[4] = np.array([math.log(x) if x > 0.0 else -math.inf for x in lowest]).view(np.int64)
    filtered = (table[1] != _EVERYTHING) | (shares < 1.0) | (np.array(lowest) > 0.0)
    return table, filtered & drawn


def outcome(token_ids: Tensor, peaks: Tensor) -> Tensor:
    """What is read of R rows: int64 [2, R], `token_ids` int64 [R] and the bits of `peaks` fp32 [R].

    Peaks are the largest logits, NaN if the row holds one.
    """
    return torch.stack((token_ids, peaks.view(torch.int32).long()))


def usable_rows(drawn: Tensor) -> Tensor:
    """Whether a token could be sampled for each of R rows, bool [R], given their `outcome`."""
    return drawn[1].int().view(torch.float32).isfinite()


def draw_plainly(logits: Tensor, parameters: DrawParameters | None, positions: Tensor | None) -> Tensor:
    """Draw a token for each of R rows of `logits` [R, vocab]; see `outcome`. Without parameters all are greedy."""
    logits = logits.float()
    if parameters is None or positions is None:
        return outcome(logits.argmax(-1), logits.amax(-1))
    return outcome(sample_together(logits, parameters, positions), logits.amax(-1))


def sample_together(logits: Tensor, parameters: DrawParameters, positions: Tensor) -> Tensor:
    """Sample one token for each of R rows: int64 [R] from `logits` fp32 [R, vocab], at `positions` int64 [R].

    Rows whose temperature is 0 get the lowest of their most likely tokens.
    """
    greedy = logits.argmax(-1)
    temperature = parameters.temperature
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)[:, None]
    noise = uniform(mixed(parameters.hashes, positions), torch.arange(logits.shape[1], device=logits.device))
    exponential = noise.log_().neg_().log_()
    if not parameters.filters:
        return torch.where(temperature > 0, (scaled - exponential).argmax(-1), greedy)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    scores = (values - exponential.gather(1, order)).masked_fill_(~_kept(values, parameters), float("-inf"))
    return torch.where(temperature > 0, order.gather(1, scores.argmax(-1, keepdim=True))[:, 0], greedy)


def _kept(values: Tensor, parameters: DrawParameters) -> Tensor:
    """Bool [R, vocab]: which of the `values`, sorted best first, the filters keep. Ties with the k-th best are kept."""
    last = parameters.top_k.clamp(max=values.shape[1])[:, None] - 1
    kept = values >= values.gather(1, last)
    weights = values.exp().masked_fill_(~kept, 0.0).double()
    mass = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    kept[:, 1:] &= mass[:, :-1] < parameters.top_p[:, None]  # the best token always stays: no mass is before it
    return kept & (values >= parameters.floor[:, None])
