"""Experts whose weights are stored in FP8 or MXFP4, and their sum in plain operations."""

from __future__ import annotations

from dataclasses import replace

import torch

from longspan.compiled.mxfp4 import mxfp4_numbers
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts, activate
from longspan.models.ops import PlainOps
from longspan.models.packed import PackedLinear
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear, dequantised, rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fp8_stack(*shape: int) -> LinearStack:
    """Random weights [E, out, in] in FP8, with scales of many magnitudes."""
    count, out, into = shape
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(count, out // BLOCK, into // BLOCK) + 0.1
    return on_device(values, scales / into**0.5)


def mxfp4_stack(*shape: int) -> LinearStack:
    """Random codes of weights [E, out, in], with scales of many magnitudes."""
    count, out, into = shape
    values = torch.randint(0, 256, (count, out, into // 2), dtype=torch.uint8)
    return on_device(values, torch.randint(118, 124, (count, out, into // 32), dtype=torch.uint8))


def on_device(values: torch.Tensor, scales: torch.Tensor) -> LinearStack:
    values, scales = values.to(DEVICE), scales.to(DEVICE)
    if values.dtype == torch.uint8:
        return LinearStack(tuple(map(PackedLinear, values, scales)), values, scales)
    each = zip(values, scales, strict=True)
    return LinearStack(tuple(BlockScaledLinear(BlockScaled(*pair)) for pair in each), values, scales)


def stored_layer(name: str, total: int, hidden: int, width: int, clamped: bool = False) -> RoutedExperts:
    """All experts of a layer in `fp8` or `mxfp4`; gpt-oss's have biases and a clamped activation."""
    torch.manual_seed(1)
    stack = {"fp8": fp8_stack, "mxfp4": mxfp4_stack}[name]
    found = RoutedExperts(0, total, stack(total, 2 * width, hidden), stack(total, hidden, width))
    if not clamped:
        return found
    biases = (torch.randn(total, size).to(DEVICE) for size in (2 * width, hidden))
    return RoutedExperts(0, total, found.gate_up, found.down, *biases, limit=1.5)


def part(whole: RoutedExperts, first: int, stop: int) -> RoutedExperts:
    """Experts [first, stop) of a layer."""
    stacks = (
        LinearStack(s.linears[first:stop], s.weight[first:stop], s.scales[first:stop])
        for s in (whole.gate_up, whole.down)
    )
    biases = (None if bias is None else bias[first:stop] for bias in (whole.gate_up_bias, whole.down_bias))
    return RoutedExperts(first, whole.total, *stacks, *biases, whole.limit)


def numbers(stack: LinearStack) -> torch.Tensor:
    """The weights [E, out, in] in fp64."""
    if stack.weight.dtype == torch.uint8:
        return mxfp4_numbers(stack.weight, stack.scales).double()
    each = zip(stack.weight, stack.scales, strict=True)
    return torch.stack([dequantised(BlockScaled(*pair)).double() for pair in each])


def plain_sum(held, x, experts, weights, rounds: bool) -> torch.Tensor:
    """The sum in fp64 of each row and choice; with `rounds` activations are rounded to FP8."""
    round_ = as_fp8 if rounds else torch.Tensor.double
    gate_up, down = numbers(held.gate_up), numbers(held.down)
    found = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for row in range(len(x)):
        for choice, expert in enumerate((experts[row] - held.first).tolist()):
            if 0 <= expert < len(held):
                inner = round_(x[row : row + 1]) @ gate_up[expert].T
                inner = inner if held.gate_up_bias is None else inner + held.gate_up_bias[expert]
                outer = round_(activate(inner, held.limit, PlainOps()).float()) @ down[expert].T
                outer = outer if held.down_bias is None else outer + held.down_bias[expert]
                found[row] += weights[row, choice].double() * outer[0]
    return found


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    """x [T, in] rounded to FP8 as the kernels round it, in fp64.

    Where a value is rounded up to a power of two, Triton's interpreter loses the carry into an odd exponent.
    """
    values, scales = rounded(x)
    scales = scales.double().repeat_interleave(BLOCK, 1)
    if DEVICE == "cpu":
        bits = values.view(torch.uint8)
        carried = (bits & 7 == 0) & (values.double().abs() > (x.double() / scales).abs())
        lost = carried & ((bits >> 3) & 1 == 0) & (bits & 0x78 != 0)
        values = (bits - 8 * lost.to(torch.uint8)).view(torch.float8_e4m3fn)
    return values.double() * scales


def routing(rows: int, total: int, hidden: int, chosen: int = 3, seed: int = 0):
    """Rows x [rows, hidden], distinct experts of each and their weights."""
    torch.manual_seed(seed)
    experts = torch.rand(rows, total).topk(chosen, sorted=False).indices
    found = torch.randn(rows, hidden), experts, torch.rand(rows, chosen)
    return tuple(each.to(DEVICE) for each in found)


def in_bfloat16(held: RoutedExperts) -> RoutedExperts:
    """The same experts with biases in bfloat16."""
    if held.limit is None:
        return held
    return replace(held, gate_up_bias=held.gate_up_bias.bfloat16(), down_bias=held.down_bias.bfloat16())
