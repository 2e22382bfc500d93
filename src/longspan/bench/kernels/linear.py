"""Benchmark of matrix products: every form in which the device multiplies by a weight, for few and many rows.

It owns the cases, the bytes and operations that they need, and the comparison with fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import ceil
from types import MappingProxyType

import torch
from torch import Tensor

from longspan.bench.kernels.harness import Harness, KernelRow
from longspan.compiled.blocks import BLOCK as BLOCK_COLUMNS
from longspan.compiled.library import problem_of_kernels
from longspan.models.context import Linear
from longspan.models.layers import DenseLinear, can_pack, dense_linear, problem_of_few_rows
from longspan.models.quantised import linear_in_form, problem_of_form
from longspan.models.registry import find_family
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear, problem_of_kernel
from longspan.models.shapes import requests_of
from longspan.weights.source import find_source

_CHECKED = 32  # rows whose products are compared with fp64
_READ_BYTES = 64 << 20  # of weights that a CPU reads in turn, so that they are read from memory as in a step
_MOST_COPIES = 256
_FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Form:
    """A way to store a weight and to multiply by it."""

    # bytes of an element of the weight
    element_bytes: float
    # makes the product of a weight [out, in]
    build: Callable[[Tensor], Linear]
    # of activations; None: that of the harness
    dtype: torch.dtype | None = None
    # why this machine cannot compute it, called with a weight [out, in]; None if it can
    problem: Callable[[Tensor], str | None] = lambda weight: None


def _scaled(weight: Tensor) -> Linear:
    """The product with a weight [out, in] in FP8, with a scale for each block of 128 x 128."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    scales = blocks.abs().amax((1, 3)) / _FP8_LARGEST
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
    return BlockScaledLinear(BlockScaled(values, scales), fused=True)


def _problem_of_blocks(weight: Tensor) -> str | None:
    if any(size % BLOCK for size in weight.shape):
        return f"is not made of whole blocks of {BLOCK} x {BLOCK}"
    return problem_of_kernel(weight.device)


def _problem_of_columns(weight: Tensor) -> str | None:
    ragged = weight.shape[1] % BLOCK_COLUMNS
    return f"has columns that are no multiple of {BLOCK_COLUMNS}" if ragged else None


def _quantised(name: str) -> Form:
    return Form(
        {"fp16": 2, "int8": 1}[name], partial(linear_in_form, form=name, is_whole=True),
        problem=lambda weight: problem_of_form(name),
    )  # fmt: skip


def _packing_problem(weight: Tensor) -> str | None:
    return None if can_pack(weight) else f"PyTorch {torch.__version__} has no packed product"


FORMS: Mapping[str, Mapping[str, Form]] = MappingProxyType({
    "cpu": {
        "plain": Form(4, partial(DenseLinear, pack=False)),
        "packed": Form(4, DenseLinear, problem=_packing_problem),
        "panels": Form(
            4, partial(linear_in_form, form="panels", is_whole=True), problem=lambda weight: problem_of_kernels()
        ),
        "blocks": Form(
            4 / 8 + 8 / BLOCK_COLUMNS, partial(linear_in_form, form="blocks", is_whole=True),
            problem=lambda weight: problem_of_kernels() or _problem_of_columns(weight),
        ),
        "fp16": _quantised("fp16"),
        "int8": _quantised("int8"),
    },
    "cuda": {
        "bf16": Form(2, DenseLinear),
        "few-rows": Form(2, dense_linear, problem=problem_of_few_rows),
        "fp16": Form(2, lambda weight: DenseLinear(weight.half()), torch.float16),
        "fp8": Form(1 + 4 / BLOCK**2, _scaled, problem=_problem_of_blocks),
    },
})  # fmt: skip
"""The forms of each device, with the reference first. MXFP4 weights are dequantised at load, so they are `bf16`."""


def shapes_of_model(name: str) -> list[tuple[int, int]]:
    """(out, in) of each different product of a model, in the order of its layers; it needs no weights."""
    family, model = find_family(find_source(name, needs_weights=False).config)
    asked = requests_of(lambda context: family.build(model, context, torch.bfloat16)).matrices
    found = [(sum(param.shape[-2] for param in request), request[0].shape[-1]) for request in asked]
    return list(dict.fromkeys(found))


def run_products(
    harness: Harness, shapes: Iterable[tuple[int, int]], rows: Sequence[int], names: Sequence[str]
) -> tuple[list[KernelRow], dict[str, float]]:
    """Time every form for each weight (out, in) and number of rows. Returns the results, and each form's largest error.

    An error is relative to the largest element of the product in fp64, with the weight before it was quantised.
    """
    forms = {name: FORMS[harness.device.type][name] for name in names}
    found: list[KernelRow] = []
    errors: dict[str, float] = {}
    for out, into in shapes:
        case: dict[str, str | int] = {"kernel": "linear", "shape": f"{out}x{into}"}
        sizes = {name: ceil(form.element_bytes * out * into) for name, form in forms.items()}
        weights = sum(size * _copies(harness, size) for size in sizes.values())
        lacking = harness.lacks(weights + 8 * out * into)
        if lacking:
            found.append(KernelRow(case, "-", weights, 0, None, lacking))
            continue
        found += _run_shape(harness, case, (out, into), rows, forms)
    for row in found:
        if row.error is not None:
            errors[row.backend] = max(row.error, errors.get(row.backend, 0.0))
    return found, errors


def _run_shape(
    harness: Harness, shape: dict[str, str | int], size: tuple[int, int], rows: Sequence[int], forms: Mapping[str, Form]
) -> list[KernelRow]:
    """The rows of one weight (out, in)."""
    (out, into), dtype = size, harness.dtype
    weight = torch.randn(out, into, device=harness.device, dtype=dtype) * into**-0.5
    exact_weight = weight.double()
    problems = {name: form.problem(weight) for name, form in forms.items()}
    built = {
        name: [form.build(weight) for _ in range(_copies(harness, ceil(form.element_bytes * out * into)))]
        for name, form in forms.items()
        if problems[name] is None
    }
    found: list[KernelRow] = []
    for count in rows:
        x = torch.randn(count, into, device=harness.device, dtype=dtype)
        exact = x[:_CHECKED].double() @ exact_weight.t()
        for name, form in forms.items():
            case: dict[str, str | int] = {**shape, "rows": count}
            given = x.to(form.dtype or dtype)
            moved = int(out * into * form.element_bytes) + count * (out + into) * given.element_size()
            if problem := problems[name]:
                found.append(KernelRow(case, name, moved, 2 * count * out * into, None, problem))
                continue
            row = harness.measure(case, name, (moved, 2 * count * out * into), _in_turn(built[name], given))
            if row.timing is not None:
                difference = built[name][0](given)[:_CHECKED].double() - exact
                row = replace(row, error=float(difference.abs().max() / exact.abs().max()))
            found.append(replace(row, command=_command(harness, case, name)))
    return found


def _in_turn(layers: Sequence[Linear], x: Tensor) -> Callable[[], object]:
    turns = cycle(layers)
    return lambda: next(turns)(x)


def _copies(harness: Harness, size: int) -> int:
    """Copies of a weight of `size` bytes that are multiplied in turn. On a GPU the clock empties the cache."""
    return 1 if harness.device.type == "cuda" else min(_MOST_COPIES, ceil(_READ_BYTES / size))


def _command(harness: Harness, case: Mapping[str, str | int], form: str) -> str:
    device, shape, rows = harness.device.type, case["shape"], case["rows"]
    return f"longspan bench linear --device {device} --shapes {shape} --rows {rows} --forms {form}"
