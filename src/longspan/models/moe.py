"""A mixture of experts: a router, the experts held here, and the shared expert.

It owns routing and the experts' names; which experts a rank holds is what its loader says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models.config import MoEConfig
from longspan.models.context import Provided
from longspan.models.layers import Linear
from longspan.models.params import Param


def moe_params(moe: MoEConfig, hidden: int, prefix: str) -> dict[str, Param]:
    """A layer's parameters by role; an expert's roles end in its number."""
    params = {"router": Param(f"{prefix}.gate.weight", (moe.num_experts, hidden), (None, None))}
    if moe.correction_bias:
        params["bias"] = Param(f"{prefix}.gate.e_score_correction_bias", (moe.num_experts,), (None,), exact=True)
    gate, up, down = moe.names
    for expert in range(moe.num_experts):
        name = f"{prefix}.experts.{expert}"
        wide = moe.intermediate_size
        params[f"gate{expert}"] = Param(f"{name}.{gate}.weight", (wide, hidden), (None, None))
        params[f"up{expert}"] = Param(f"{name}.{up}.weight", (wide, hidden), (None, None))
        params[f"down{expert}"] = Param(f"{name}.{down}.weight", (hidden, wide), (None, None))
    if moe.shared_intermediate_size:
        name, wide = f"{prefix}.shared_experts", moe.shared_intermediate_size
        params["shared_gate"] = Param(f"{name}.gate_proj.weight", (wide, hidden), ("shared_ffn", None))
        params["shared_up"] = Param(f"{name}.up_proj.weight", (wide, hidden), ("shared_ffn", None))
        params["shared_down"] = Param(f"{name}.down_proj.weight", (hidden, wide), (None, "shared_ffn"))
    return params


class _Expert:
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate).mul_(up))


class MixtureOfExperts:
    """The experts in its loader's extent; rows reach all experts through the expert group."""

    def __init__(self, moe: MoEConfig, hidden: int, prefix: str, given: Provided) -> None:
        params = moe_params(moe, hidden, prefix)
        self._moe = moe
        self._tp = given.tp
        self._group = given.experts
        self._router = given.loader.load(params["router"]).float()
        self._bias = given.loader.load(params["bias"]) if moe.correction_bias else None
        start, stop = given.loader.extent("experts", moe.num_experts)
        self._experts = {
            expert: _Expert(
                given.loader.linear(params[f"gate{expert}"], params[f"up{expert}"]),
                given.loader.linear(params[f"down{expert}"]),
            )
            for expert in range(start, stop)
        }
        self._shared: _Expert | None = None
        if moe.shared_intermediate_size:
            self._shared = _Expert(
                given.loader.linear(params["shared_gate"], params["shared_up"]),
                given.loader.linear(params["shared_down"]),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        experts, weights = route(F.linear(x.float(), self._router), self._bias, self._moe)
        out = self._group.apply(x, experts, weights, self._sum)
        return self._tp.all_reduce(out if self._shared is None else out.add_(self._shared(x)))

    def _sum(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the experts held here add to rows x [R, hidden] that chose `experts` [R, k] with `weights`."""
        out = torch.zeros_like(x)
        for expert, compute in self._experts.items():
            rows, choices = torch.where(experts == expert)
            if rows.numel():
                out.index_add_(0, rows, compute(x[rows]) * weights[rows, choices, None].to(x.dtype))
        return out


def route(logits: Tensor, bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """(experts [T, k] int64, their weights [T, k] fp32) of router logits [T, E].

    DeepSeek-V3 (2024, eqs. 12-16): the correction bias counts for the choice, not for the weight.
    """
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    merit = scores if bias is None else scores + bias
    if moe.num_groups > 1:
        grouped = merit.unflatten(-1, (moe.num_groups, -1))  # type: ignore[no-untyped-call]
        group_merit = grouped.topk(moe.group_top, dim=-1).values.sum(-1)
        best = group_merit.topk(moe.groups_per_token, dim=-1, sorted=False).indices
        lost = torch.ones_like(group_merit, dtype=torch.bool).scatter_(1, best, False)
        merit = grouped.masked_fill(lost[..., None], float("-inf")).flatten(1)
    experts = merit.topk(moe.experts_per_token, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if moe.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if moe.scoring == "sigmoid" else 0.0))
    return experts, weights * moe.scaling
