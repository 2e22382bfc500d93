"""A mixture of experts: a router, the experts that this rank holds, and the shared expert.

It owns routing. The loader decides which experts a rank holds, and `experts.py` knows what an expert computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models.config import MoEConfig
from longspan.models.context import LayerContext
from longspan.models.experts import routed_experts, shared_expert
from longspan.models.grouped import choose_sum
from longspan.models.layers import PartialSum
from longspan.models.params import Param


class ExpertRouter:
    """Which experts each row is routed to. Computed in fp32, and not sharded."""

    def __init__(self, moe: MoEConfig, hidden: int, prefix: str, context: LayerContext) -> None:
        loader = context.loader
        name, count = f"{prefix}.{moe.router}", moe.num_experts
        self._moe = moe
        self._route = choose_route(loader.device)
        self._weight = loader.load(Param(f"{name}.weight", (count, hidden), (None, None))).float()
        self._bias: Tensor | None = None
        self._correction: Tensor | None = None
        if moe.router_bias:
            self._bias = loader.load(Param(f"{name}.bias", (count,), (None,))).float()
        if moe.correction_bias:
            self._correction = loader.load(Param(f"{name}.e_score_correction_bias", (count,), (None,), exact=True))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] → (experts [T, k] int64, weights [T, k] fp32), with k experts for each token."""
        return self._route(F.linear(x.float(), self._weight, self._bias), self._correction, self._moe)


class MixtureOfExperts:
    """The experts that its loader gives. Rows are sent to the other experts through the expert group."""

    def __init__(self, moe: MoEConfig, hidden: int, prefix: str, context: LayerContext) -> None:
        loader = context.loader
        self._tp = context.tp
        self._group = context.experts
        self._router = ExpertRouter(moe, hidden, prefix, context)
        start, stop = loader.extent("experts", moe.num_experts)
        self.experts = routed_experts(moe, hidden, prefix, context, range(start, stop))
        self._sum_of = choose_sum(self.experts)
        self._shared = shared_expert(moe, hidden, prefix, context) if moe.shared_intermediate_size else None

    def __call__(self, x: Tensor) -> PartialSum:
        """x [T, hidden] → [T, hidden]."""
        out = self._group.apply(x, *self._router(x), self._sum)
        return PartialSum(self._tp, out if self._shared is None else out.add_(self._shared(x)))

    def _sum(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum [T, hidden] over the experts held here, of x [T, hidden].

        `experts` [T, k] int64 and `weights` [T, k] are the routing of these rows.
        """
        return self._sum_of(self.experts, x, experts, weights)


def route(logits: Tensor, bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] fp32 → (experts [T, k] int64, weights [T, k] fp32), as `moe.scoring` says.

    `bias` [E] is DeepSeek-V3's correction bias (2024, eqs. 12-16): it is added to the scores for the choice of experts,
    and not for their weights.
    """
    if moe.scoring == "softmax_of_chosen":
        chosen = logits.topk(moe.experts_per_token, dim=-1)
        return chosen.indices, chosen.values.softmax(-1)
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    merit = scores if bias is None else scores + bias
    if moe.num_groups > 1:  # experts outside the best groups cannot be chosen
        grouped = merit.unflatten(-1, (moe.num_groups, -1))  # type: ignore[no-untyped-call]
        group_merit = grouped.topk(moe.group_top, dim=-1).values.sum(-1)
        best = group_merit.topk(moe.groups_per_token, dim=-1, sorted=False).indices
        lost = torch.ones_like(group_merit, dtype=torch.bool).scatter_(1, best, False)
        merit = grouped.masked_fill(lost[..., None], float("-inf")).flatten(1)
    experts = merit.topk(moe.experts_per_token, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if moe.normalise:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + 1e-20 if moe.scoring == "sigmoid" else total)
    return experts, weights if moe.scaling == 1 else weights * moe.scaling


def choose_route(device: torch.device) -> Callable[[Tensor, Tensor | None, MoEConfig], tuple[Tensor, Tensor]]:
    """`route`, or on a GPU its kernel, which replaces ten to twenty small ones."""
    if device.type != "cuda":
        return route
    try:
        from longspan.models.fused_router import route_fused
    except ImportError:  # no Triton
        return route
    return route_fused
