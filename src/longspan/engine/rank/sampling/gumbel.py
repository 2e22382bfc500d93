"""Sample many rows at once, without reading anything back from the device.

It owns the batched form of temperature, top-k, top-p, min-p and Gumbel sampling. Its reference is the sampler's code
for one row, which on a CPU is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.engine.rank.sampling.random_numbers import mix, uniform
from longspan.request import SamplingParams

_COLDEST = 1e-5  # lower temperatures are greedy


def sample_together(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Sample one token for each of R rows: int64 [R] from `logits` fp32 [R, vocab].

    `seeds` are (the request's seed, position). The tokens of greedy rows are undefined.
    """
    device = logits.device
    temperature = torch.tensor([max(one.temperature, _COLDEST) for one in params], device=device)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    noise = uniform([mix(*seed) for seed in seeds], torch.arange(logits.shape[1], device=device))
    exponential = noise.log_().neg_().log_()
    if not any(one.top_k > 0 or one.top_p < 1.0 or one.min_p > 0.0 for one in params):
        return (scaled - exponential).argmax(-1)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    scores = (values - exponential.gather(1, order)).masked_fill_(~_kept(values, params), float("-inf"))
    return order.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


def _kept(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Bool [R, vocab]: which of the `values`, sorted best first, the filters keep. Ties with the k-th best are kept."""
    vocabulary, device = values.shape[1], values.device
    top_k = torch.tensor([one.top_k if 0 < one.top_k < vocabulary else vocabulary for one in params], device=device)
    kept = values >= values.gather(1, top_k[:, None] - 1)
    weights = values.exp().masked_fill_(~kept, 0.0).double()
    mass = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    # 2.0 is no filter: the mass may exceed 1 by rounding. The best token always stays, as there is no mass before it.
    top_p = torch.tensor([one.top_p if one.top_p < 1.0 else 2.0 for one in params], dtype=torch.float64, device=device)
    kept[:, 1:] &= mass[:, :-1] < top_p[:, None]
    floors = [math.log(one.min_p) if one.min_p > 0.0 else float("-inf") for one in params]
    return kept & (values >= torch.tensor(floors, device=device)[:, None])
