"""Benchmark of a mixture's experts: every form of their weighted sum, for few and many rows.

It owns the cases, the bytes and operations that they need, and the comparison with fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.bench.kernels.harness import Harness, KernelRow
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.grouped import ExpertSum, choose_sum, sum_grouped, sum_one_by_one
from longspan.models.layers import DenseLinear
from longspan.models.ops import choose_ops

_CHECKED = 32  # rows whose sums are compared with fp64


@dataclass(frozen=True)
class MixtureShape:
    """The sizes of a layer's routed experts."""

    # number of experts
    experts: int
    # experts of a row
    chosen: int
    # width of the hidden states
    hidden: int
    # width of an expert
    width: int

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.width

    def build(self, harness: Harness) -> RoutedExperts:
        """Random experts. As a loader does, products on a CPU pack their weights; the plain ones are kept too."""
        inner, outer = (2 * self.width, self.hidden), (self.hidden, self.width)
        return RoutedExperts(
            0,
            self.experts,
            self._stack(harness, *inner),
            self._stack(harness, *outer),
            ops=choose_ops(harness.device),
        )

    def _stack(self, harness: Harness, out: int, into: int) -> LinearStack:
        weight = torch.empty(self.experts, out, into, device=harness.device, dtype=harness.dtype)
        weight.normal_(std=into**-0.5)
        packs = harness.device.type == "cpu"
        return LinearStack(tuple(DenseLinear(each, pack=packs) for each in weight), weight)

    def route(self, harness: Harness, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [rows, hidden], experts [rows, chosen] int64 chosen at random, and their weights [rows, chosen] fp32."""
        x = torch.randn(rows, self.hidden, device=harness.device, dtype=harness.dtype)
        experts = torch.rand(rows, self.experts, device=harness.device).topk(self.chosen, sorted=False).indices
        return x, experts, torch.rand(rows, self.chosen, device=harness.device)

    def size(self, harness: Harness, experts: Tensor) -> tuple[int, int]:
        """(bytes, operations) for rows that chose `experts` [T, k].

        Every chosen expert is read once, and every row is read and written once.
        """
        rows = experts.shape[0]
        moved = len(torch.unique(experts)) * self.elements + 2 * rows * self.hidden
        return moved * harness.dtype.itemsize, 2 * rows * self.chosen * self.elements


def run_mixtures(
    harness: Harness, shape: MixtureShape, rows: Iterable[int]
) -> tuple[list[KernelRow], dict[str, float]]:
    """Time every form for each number of rows. Returns the results, and the largest error of each form and case.

    An error is relative to the largest element of the sum in fp64.
    """
    weights = shape.experts * shape.elements * harness.dtype.itemsize
    lacking = harness.lacks(3 * weights if harness.device.type == "cpu" else weights)
    if lacking:
        return [KernelRow({"kernel": "mixture"}, "-", weights, 0, None, lacking)], {}
    held = shape.build(harness)
    found: list[KernelRow] = []
    errors: dict[str, float] = {}
    for count in rows:
        given = shape.route(harness, count)
        exact = _exact(held, *(part[:_CHECKED] for part in given))
        for name, form in _forms(held, given[1].numel()).items():
            case: dict[str, str | int] = {"kernel": "mixture", "rows": count}
            found.append(harness.measure(case, name, shape.size(harness, given[1]), _work(form, held, given)))
            if found[-1].timing is not None:
                difference = form(held, *given)[:_CHECKED].double() - exact
                errors[f"{count} rows {name}"] = float(difference.abs().max() / exact.abs().max())
    return found, errors


def _forms(held: RoutedExperts, pairs: int) -> dict[str, ExpertSum]:
    """The forms that this device has, for so many pairs of row and choice. The loop is the first."""
    found: dict[str, ExpertSum] = {"loop": sum_one_by_one}
    if choose_sum(held) is sum_one_by_one:
        return found
    from longspan.models.fused_experts import few_enough, sum_fused  # imports Triton
    from longspan.models.sorted_experts import sum_sorted
    from longspan.models.tiled_experts import sum_tiled

    found |= {"grouped": sum_grouped, "sorted": sum_sorted, "tiled": sum_tiled}
    if few_enough(held, pairs):
        found["fused"] = sum_fused
    return found


def _work(form: ExpertSum, held: RoutedExperts, given: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    return lambda: form(held, *given)


def _exact(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The sum [T, hidden] in fp64, of the same x [T, hidden], weights and experts."""
    gate_up, down = (
        LinearStack(tuple(_WideLinear(stack, number) for number in range(held.total)))
        for stack in (held.gate_up, held.down)
    )
    return sum_one_by_one(RoutedExperts(0, held.total, gate_up, down), x.double(), experts, weights.double())


class _WideLinear:
    """A product in fp64, for which the weight is converted each time."""

    def __init__(self, stack: LinearStack, number: int) -> None:
        self._stack = stack
        self._number = number

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        if self._stack.weight is None:
            raise TypeError("the plain weights were not kept")
        return torch.nn.functional.linear(x, self._stack.weight[self._number].double(), bias)
