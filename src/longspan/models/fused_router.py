"""The choice of each row's experts from the router's logits, in one kernel.

It owns this kernel and its launch; `moe.route` is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.config import MoEConfig

_WARPS = 1  # a row has a few hundred logits at most
_LEAST = 1e-20  # added to the sum of sigmoid weights, which could be zero


def route_fused(logits: Tensor, bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """See `moe.route`: logits [T, E] fp32, bias [E] → experts [T, k] int64, weights [T, k] fp32, the best first."""
    rows, count = logits.shape
    experts = torch.empty(rows, moe.experts_per_token, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, moe.experts_per_token, dtype=torch.float32, device=logits.device)
    if not rows:
        return experts, weights
    each = count // moe.num_groups
    _route_kernel[(rows,)](
        logits.contiguous(), bias, experts, weights, float(moe.scaling),
        GROUPS=moe.num_groups, EACH=each, CHOSEN=moe.experts_per_token,
        ROWS=triton.next_power_of_2(moe.num_groups), COLUMNS=triton.next_power_of_2(each),
        PLACES=triton.next_power_of_2(moe.experts_per_token),
        BEST=moe.groups_per_token, TOP=moe.group_top, SCORING=moe.scoring, NORMALISE=moe.normalise, LEAST=_LEAST,
        num_warps=_WARPS,
    )  # fmt: skip
    return experts, weights


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    logits, bias, experts, weights, scaling,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PLACES: tl.constexpr, BEST: tl.constexpr, TOP: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """One program routes one row. Its experts lie in a grid [groups, experts of a group], padded to powers of 2."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    number = group[:, None] * EACH + column[None, :]
    real = (group < GROUPS)[:, None] & (column < EACH)[None, :]
    scores = tl.load(logits + row * (GROUPS * EACH) + number, mask=real, other=float("-inf"))
    if SCORING == "softmax":
        scores = tl.exp(scores - tl.max(tl.max(scores, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    merit = scores
    if bias is not None:
        merit += tl.load(bias + number, mask=real, other=0.0)
    merit = tl.where(real, merit, float("-inf"))
    if GROUPS > 1:
        left = merit
        total = tl.zeros((ROWS,), tl.float32)
        for _ in tl.static_range(TOP):
            best = tl.max(left, 1)
            total += best
            at = tl.min(tl.where(left == best[:, None], column[None, :], COLUMNS), 1)
            left = tl.where(column[None, :] == at[:, None], float("-inf"), left)
        total = tl.where(group < GROUPS, total, float("-inf"))
        kept = tl.zeros((ROWS,), tl.int32)
        for _ in tl.static_range(BEST):
            at = tl.min(tl.where(total == tl.max(total, 0), group, ROWS), 0)
            kept = tl.where(group == at, 1, kept)
            total = tl.where(group == at, float("-inf"), total)
        merit = tl.where(kept[:, None] == 1, merit, float("-inf"))
    place = tl.arange(0, PLACES)
    found = tl.full((PLACES,), float("-inf"), tl.float32)
    for choice in tl.static_range(CHOSEN):
        best = tl.max(tl.max(merit, 1), 0)
        at = tl.min(tl.min(tl.where(merit == best, number, GROUPS * EACH - 1), 1), 0)  # an expert even if all are NaN
        score = tl.sum(tl.sum(tl.where((number == at) & real, scores, 0.0), 1), 0)
        found = tl.where(place == choice, score, found)
        merit = tl.where(number == at, float("-inf"), merit)
        tl.store(experts + row * CHOSEN + choice, at.to(tl.int64))
    if SCORING == "softmax_of_chosen":
        found = tl.exp(found - tl.max(found, 0))
        found = found / tl.sum(found, 0)
    else:
        found = tl.where(place < CHOSEN, found, 0.0)
        if NORMALISE:
            found = found / (tl.sum(found, 0) + (LEAST if SCORING == "sigmoid" else 0.0))
        found = found * scaling
    tl.store(weights + row * CHOSEN + place, found, mask=place < CHOSEN)
