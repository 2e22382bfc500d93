"""Benchmark of a mixture's experts: every form of their weighted sum, for few and many rows.

It owns the cases, the bytes and operations that they need, and the comparison with fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from longspan.bench.kernels.harness import Harness, KernelRow
from longspan.compiled.mxfp4 import BLOCK as PACKED_BLOCK
from longspan.compiled.mxfp4 import mxfp4_numbers
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.grouped import ExpertSum, choose_sum, sum_grouped, sum_one_by_one
from longspan.models.layers import DenseLinear
from longspan.models.ops import choose_ops
from longspan.models.packed import PackedLinear
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear, dequantised

_CHECKED = 32  # rows whose sums are compared with fp64
STORED: Mapping[str, float | None] = MappingProxyType(
    {"plain": None, "fp8": 1 + 4 / BLOCK**2, "mxfp4": 1 / 2 + 1 / PACKED_BLOCK}
)
"""Forms in which weights are stored, with the bytes of an element; None: those of the harness's dtype."""

BLOCKS: Mapping[str, int] = MappingProxyType({"fp8": BLOCK, "mxfp4": PACKED_BLOCK})
"""Of these forms the elements that share a scale, of which sizes must be multiples."""


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
    # one of `STORED`
    stored: str = "plain"

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
        shape, device = (self.experts, out, into), harness.device
        if self.stored == "fp8":
            values = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
            scales = torch.full((self.experts, out // BLOCK, into // BLOCK), into**-0.5, device=device)
            scaled = map(BlockScaled, values, scales)
            return LinearStack(tuple(BlockScaledLinear(each) for each in scaled), values, scales)
        if self.stored == "mxfp4":
            values = torch.randint(0, 256, (self.experts, out, into // 2), dtype=torch.uint8, device=device)
            scales = torch.randint(
                118, 124, (*values.shape[:2], into // PACKED_BLOCK), dtype=torch.uint8, device=device
            )
            return LinearStack(tuple(map(PackedLinear, values, scales)), values, scales)
        weight = torch.empty(shape, device=device, dtype=harness.dtype)
        weight.normal_(std=into**-0.5)
        packs = device.type == "cpu"
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
        each = STORED[self.stored] or harness.dtype.itemsize
        moved = len(torch.unique(experts)) * self.elements * each + 2 * rows * self.hidden * harness.dtype.itemsize
        return int(moved), 2 * rows * self.chosen * self.elements

    def command(self, harness: Harness, rows: int) -> str:
        """What repeats a case."""
        sizes = f"{self.experts}x{self.chosen}x{self.hidden}x{self.width}"
        stored = "" if self.stored == "plain" else f" --weights {self.stored}"
        return f"longspan bench moe --device {harness.device.type} --shape {sizes} --rows {rows}{stored}"


def run_mixtures(
    harness: Harness, shape: MixtureShape, rows: Iterable[int]
) -> tuple[list[KernelRow], dict[str, float]]:
    """Time every form for each number of rows. Returns the results, and the largest error of each form and case.

    An error is relative to the largest element of the sum in fp64.
    """
    weights = int(shape.experts * shape.elements * (STORED[shape.stored] or harness.dtype.itemsize))
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
            row = harness.measure(case, name, shape.size(harness, given[1]), _work(form, held, given))
            found.append(replace(row, command=shape.command(harness, count)))
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

    if held.gate_up.scales is None:
        found |= {"grouped": sum_grouped, "sorted": sum_sorted}
    found["tiled"] = sum_tiled
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
        return torch.nn.functional.linear(x, _numbers(self._stack, self._number).double(), bias)


def _numbers(stack: LinearStack, number: int) -> Tensor:
    """One weight [out, in] of a stack, dequantised."""
    weight = stack.stored[number]
    if stack.scales is None:
        return weight
    scales = stack.scales[number]
    return mxfp4_numbers(weight, scales) if weight.dtype == torch.uint8 else dequantised(BlockScaled(weight, scales))
