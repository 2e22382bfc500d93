"""Compiles the kernels of experts in FP8 and MXFP4, and those of many rows, for GPUs without one.

`python -m tests.gpu.compile_stored_experts [ARCH]...`, without the variable that asks for Triton's interpreter, says
what each takes, one JSON object a kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from longspan.models import fused_experts, fused_rounding, sorted_pairs, tiled_experts
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.fused_experts import sum_fused
from longspan.models.scaled import BLOCK
from longspan.models.tiled_experts import sum_tiled
from tests.gpu.compile_attend import CHIPS, resources
from tests.gpu.compile_experts import SHAPES, Launches

LAUNCHED = {
    fused_experts: ("_tiles_kernel", "_gate_up_kernel", "_down_kernel", "_sum_kernel"),
    fused_rounding: ("round_kernel",),
    sorted_pairs: ("_count_kernel", "_before_kernel", "_place_kernel"),
    tiled_experts: ("_gate_up_tiles", "_down_tiles"),
}
FEW, MANY = ("_gate_up_kernel", "_down_kernel"), ("_gate_up_tiles", "_down_tiles")
CASES = (  # form, model, sum, the kernels that are compiled
    ("fp8", "deepseek-v3", sum_fused, FEW),
    ("fp8", "deepseek-v3", sum_tiled, MANY),
    ("mxfp4", "gpt-oss-120b", sum_fused, FEW),
    ("mxfp4", "gpt-oss-120b", sum_tiled, MANY),
    ("plain", "deepseek-v2-lite", sum_tiled, (*MANY, *LAUNCHED[sorted_pairs])),
)
GROUPED = (90, 100)  # architectures whose experts in bfloat16 may be computed in tiles


class Skipped:
    """In place of a kernel that is not compiled."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, **constants: None


def stack_of(form: str, count: int, out: int, into: int) -> LinearStack:
    """A stack of weights [count, out, into]. All are one number, since none are read."""
    kinds = {
        "plain": [(torch.bfloat16, (out, into))],
        "fp8": [(torch.float8_e4m3fn, (out, into)), (torch.float32, (out // BLOCK, into // BLOCK))],
        "mxfp4": [(torch.uint8, (out, into // 2)), (torch.uint8, (out, into // 32))],
    }
    each = (torch.zeros((), dtype=dtype).expand(count, *sizes) for dtype, sizes in kinds[form])
    return LinearStack((None,) * count, *each)


def launches_of(stored: str, form: str, model: str, of: Any, wanted: tuple[str, ...], arch: int) -> Mapping[str, Any]:
    """The wanted kernels of one sum, compiled."""
    count, hidden, width, chosen, clamped = SHAPES[model]
    biases = [torch.zeros(count, size, dtype=torch.bfloat16) for size in (2 * width, hidden)] if clamped else []
    stacks = stack_of(stored, count, 2 * width, hidden), stack_of(stored, count, hidden, width)
    held = RoutedExperts(0, count, *stacks, *biases, limit=7.0 if clamped else None)
    rows = 8 if of is sum_fused else 8192
    found: dict[str, Any] = {}
    with ExitStack() as patched:

        def replace(module: ModuleType, name: str, other: Any) -> None:
            patched.enter_context(patch.object(module, name, other))

        for module in (fused_experts, tiled_experts):
            replace(module, "form_of", lambda weight: form)
        replace(tiled_experts, "shared_limit", lambda device: CHIPS[arch].value)
        for module, names in LAUNCHED.items():
            for name in names:
                launch = Launches(getattr(module, name), arch) if name in wanted else Skipped()
                replace(module, name, launch)
                found |= {name: launch} if name in wanted else {}
        x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
        of(held, x, torch.zeros(rows, chosen, dtype=torch.int64), torch.zeros(rows, chosen))
    return {name: launch.compiled for name, launch in found.items()}


def compiled_on(arch: int) -> Iterator[dict[str, Any]]:
    """What the kernels take on an architecture."""
    for stored, model, of, wanted in CASES:
        if stored == "plain" and arch not in GROUPED:
            continue
        form = "fp8_bytes" if stored == "fp8" and arch < 89 else stored
        for name, kernel in launches_of(stored, form, model, of, wanted, arch).items():
            case = {"arch": arch, "limit": CHIPS[arch].value, "form": form, "kernel": name}
            yield {**case, "tcgen05": kernel.asm["ptx"].count("tcgen05.mma"), **resources(kernel)}


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        for found in compiled_on(arch):
            print(json.dumps(found), flush=True)
