"""The weighted sum of a mixture's experts: one after the other, or all in two grouped products.

It owns these forms and the choice between them; it must not know how rows are routed, nor who holds other experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.models.experts import RoutedExperts, activate

_CAPABILITIES = (9, 10)  # Hopper and Blackwell: elsewhere PyTorch reads the offsets back and loops
_LEAST_CAPABILITY = 8  # Ampere: the first with products of bfloat16
_ALIGNMENT = 8  # elements of bf16 in 16 bytes, of which rows must be multiples
ExpertSum = Callable[[RoutedExperts, Tensor, Tensor, Tensor], Tensor]
"""(held, x [T, hidden], experts [T, k] int64, weights [T, k] fp32) → [T, hidden]: the weighted sum over those held."""


def sum_of_none(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`: where no expert is held."""
    return torch.zeros_like(x)


def sum_one_by_one(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`. The reference. Which experts are chosen is read back, so a GPU must be waited for."""
    out = torch.zeros_like(x)
    for number in torch.unique(experts).tolist():
        if held.first <= number < held.first + len(held):
            rows, choices = torch.where(experts == number)
            out.index_add_(0, rows, held.expert(number)(x[rows]) * weights[rows, choices, None].to(x.dtype))
    return out


def sum_grouped(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`. Nothing is read back and all shapes follow from those of the arguments.

    The pairs of row and choice are sorted by expert. Those of experts that are not held come last, in no group.
    """
    if not x.shape[0]:
        return torch.zeros_like(x)
    chosen = experts.shape[1]
    # the held experts from 0 on, others behind them, also a number that is none's (`total`)
    local = (experts.flatten() - held.first).remainder_(held.total + 1)
    local, pairs = local.to(torch.int16).sort(stable=True)  # 16 bits are a quarter of the passes of 64
    numbers = torch.arange(len(held), dtype=torch.int16, device=x.device)
    stops = torch.searchsorted(local, numbers, right=True, out_int32=True)
    product = _Products(held, local, stops)
    inner = activate(product(held.gate_up.stored, x[pairs // chosen], held.gate_up_bias), held.limit, held.ops)
    found = product(held.down.stored, inner, held.down_bias)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=x.device))
    return held.ops.sum_of_places(found, places.view_as(experts), weights, stops)


class _Products:
    """Grouped products of P rows that are sorted by expert: `local` int16 [P]; the groups end at `stops` int32 [E]."""

    def __init__(self, held: RoutedExperts, local: Tensor, stops: Tensor) -> None:
        self._last = len(held) - 1
        self._local = local
        self._stops = stops

    def __call__(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [P, in], weight [E, out, in], bias [E, out] → [P, out]; rows in no group are not written."""
        # torch.nn.functional.grouped_mm calls it, and is missing from older releases
        out: Tensor = torch._grouped_mm(x, weight.mT, offs=self._stops)
        return out if bias is None else out.add_(bias[self._local.clamp_max(self._last).long()])


def problem_of_grouped(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> str | None:
    """Why experts of these sizes cannot be computed in grouped products without reading back; None if they can."""
    if device.type != "cuda":
        return "PyTorch has such a product for GPUs only"
    if dtype != torch.bfloat16:
        return f"PyTorch has such a product for bfloat16 only, not {dtype}".replace("torch.", "")
    major, _ = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES or not hasattr(torch, "_grouped_mm"):
        return f"PyTorch {torch.__version__} has no such product for compute capability {major}.x"
    if hidden % _ALIGNMENT or width % _ALIGNMENT:
        return f"the product wants multiples of {_ALIGNMENT}, not {hidden} x {width}"
    return None


def problem_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why experts cannot be computed by kernels that take weights in FP8 or MXFP4; None if they can.

    `dtype` is that of activations.
    """
    if device.type != "cuda":
        return "its kernels are for GPUs"
    if dtype == torch.float16:
        return "its kernels take bfloat16 or float32 activations, not float16"
    major, minor = torch.cuda.get_device_capability(device)
    if major < _LEAST_CAPABILITY:
        return f"its kernels need compute capability {_LEAST_CAPABILITY}.0, this GPU's is {major}.{minor}"
    try:
        import longspan.models.fused_experts  # noqa: F401
    except ImportError:
        return "its kernels need Triton, which is not installed"
    return None


def choose_sum(held: RoutedExperts) -> ExpertSum:
    """The form for experts as they are stored: products if their weights are in one tensor that such products take."""
    if not len(held):
        return sum_of_none
    gate_up, down = held.gate_up, held.down
    if gate_up.weight is None or down.weight is None:
        return sum_one_by_one
    if gate_up.scales is not None or down.scales is not None:
        alike = gate_up.weight.dtype == down.weight.dtype
        problem = problem_of_kernels(down.weight.device, torch.bfloat16)
        return _choose_by_rows("tiled") if alike and not problem else sum_one_by_one
    device, dtype, (_, hidden, width) = down.weight.device, down.weight.dtype, down.weight.shape
    if not problem_of_grouped(device, dtype, hidden, width):
        has_biases = held.gate_up_bias is not None or held.down_bias is not None
        return _choose_by_rows("grouped" if has_biases else "sorted")
    return _choose_by_rows("tiled") if not problem_of_kernels(device, dtype) else sum_one_by_one


def _choose_by_rows(many: str) -> ExpertSum:
    """The fused kernels for few rows, whose cost are launches and bytes; for many one of three forms of products.

    PyTorch's are the fastest in 16 bits, with pairs sorted by a kernel where there are no biases.
    """
    try:
        from longspan.models.fused_experts import few_enough, sum_fused
        from longspan.models.sorted_experts import sum_sorted
        from longspan.models.tiled_experts import sum_tiled
    except ImportError:  # no Triton
        return sum_grouped
    of_many = {"grouped": sum_grouped, "sorted": sum_sorted, "tiled": sum_tiled}[many]

    def by_rows(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        form = sum_fused if few_enough(held, experts.numel()) else of_many
        return form(held, x, experts, weights)

    return by_rows
