"""Compiles the experts' kernels for an H100 or H200 without one, and says what each takes, one JSON object a kernel.

`python -m tests.gpu.compile_experts [model]...`, without the variable that asks for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.models import fused_experts, fused_router
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.fused_experts import sum_fused
from longspan.models.fused_router import route_fused
from longspan.planner.models import find_model
from tests.gpu.compile_attend import resources

SHAPES = {  # experts held, hidden, width, choices of a row, gpt-oss's activation with biases
    "deepseek-v2-lite": (64, 2048, 1408, 6, False),
    "deepseek-v3": (256, 7168, 2048, 8, False),
    "gpt-oss-120b": (128, 2880, 2880, 4, True),
}
KERNELS = ("_tiles_kernel", "_gate_up_kernel", "_down_kernel", "_sum_kernel")
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


class Launches:
    """In place of a kernel: compiles it for what a launch passes."""

    def __init__(self, kernel: Any, arch: int = 90) -> None:
        self.kernel, self.arch, self.compiled = kernel, arch, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *values: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, values, strict=False))
        constants |= {name: None for name, value in given.items() if value is None}
        types = dict.fromkeys(constants, "constexpr")
        for name, value in given.items():
            if name not in types:
                kinds = TYPES[value.dtype] if isinstance(value, torch.Tensor) else None
                types[name] = kinds or ("fp32" if isinstance(value, float) else "i32")
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
        source = ASTSource(
            self.kernel,
            {name: types[name] for name in names},
            {(names.index(name),): constant for name, constant in constants.items()},
            aligned,
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)


def compiled(shape: tuple[int, int, int, int, bool], rows: int = 8) -> dict[str, dict[str, int]]:
    """What each kernel of a launch takes. Weights are expanded from one number, since none are read."""
    count, hidden, width, chosen, clamped = shape

    def stack(*sizes: int) -> LinearStack:
        return LinearStack((None,) * count, torch.zeros((), dtype=torch.bfloat16).expand(count, *sizes))

    biases = [torch.zeros(count, size, dtype=torch.bfloat16) for size in (2 * width, hidden)] if clamped else []
    held = RoutedExperts(
        0, count, stack(2 * width, hidden), stack(hidden, width), *biases, limit=7.0 if clamped else None
    )
    kernels = {name: Launches(getattr(fused_experts, name)) for name in KERNELS}
    with patch.multiple(fused_experts, **kernels):
        x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
        sum_fused(held, x, torch.zeros(rows, chosen, dtype=torch.int64), torch.zeros(rows, chosen))
    return {name: resources(kernel.compiled) for name, kernel in kernels.items()}


def compiled_router(model: str) -> dict[str, int]:
    """What the router's kernel takes."""
    moe = find_model(model)[0].moe
    kernel = Launches(fused_router._route_kernel)
    with patch.object(fused_router, "_route_kernel", kernel):
        bias = torch.zeros(moe.num_experts) if moe.correction_bias else None
        route_fused(torch.zeros(8, moe.num_experts), bias, moe)
    return resources(kernel.compiled)


if __name__ == "__main__":
    for model in sys.argv[1:] or SHAPES:
        for name, found in compiled(SHAPES[model]).items():
            print(json.dumps({"model": model, "kernel": name, **found}), flush=True)
        print(json.dumps({"model": model, "kernel": "_route_kernel", **compiled_router(model)}), flush=True)
