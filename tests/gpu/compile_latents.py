"""Compiles the kernel of latents for an H100 without one, and says what it takes, one JSON object a variant.

`python -m tests.gpu.compile_latents [variant]...`, without the variable that asks for Triton's interpreter. The backend
launches, and what it would launch is compiled.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from longspan.attention.backends.triton import backend as backend_module
from longspan.attention.backends.triton import latent_launch
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.rows import CacheRows
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from tests.gpu.compile_attend import H100, resources

ADJACENT = (Span(5, 1000),)
GATHERED = Span(5, 100), Span(200, 300), Span(700, 40)
VARIANTS = {  # the spans, the dtype of queries and latents, that of results
    "adjacent": (ADJACENT, torch.bfloat16, torch.bfloat16),
    "gathered": (GATHERED, torch.bfloat16, torch.bfloat16),
    "adjacent fp16": (ADJACENT, torch.float16, torch.float16),
    "gathered, to be merged": (GATHERED, torch.bfloat16, torch.float32),
}


class H100Driver:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H100, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a kernel: what is launched is compiled."""

    def __init__(self, kernel) -> None:
        self._kernel = kernel
        self.found = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.append(self._kernel.warmup(*args, grid=grid, **options))


def compiled(spans: tuple[Span, ...], dtype: torch.dtype, out: torch.dtype):
    """The kernel for a token of 128 query heads that sees these spans."""
    q, cache = torch.zeros(1, 128, 576, dtype=dtype), torch.zeros(1, 1, 1024, 576, dtype=dtype)
    blocks = (HeadBlock(0, 128, 0, 1),)
    kernel, reduction = Compiled(latent_launch.latent_kernel), Compiled(backend_module.reduce_kernel)
    prepared = TritonBackend(torch.device("cpu"), 512, specialised=True).prepare((QueryRun(0, 1, spans),), 1)
    with (
        patch.object(latent_launch, "latent_kernel", kernel),
        patch.object(backend_module, "reduce_kernel", reduction),
        patch.object(latent_launch, "early_options", lambda device: {"EARLY": True, "launch_pdl": True}),
        patch.object(torch.Tensor, "is_cuda", True),
    ):
        prepared.attend(q, CacheRows(cache), blocks, 0.1, out)
    (found,) = kernel.found
    return found


if __name__ == "__main__":
    driver.set_active(H100Driver())
    for name in sys.argv[1:] or VARIANTS:
        print(json.dumps({"variant": name, **resources(compiled(*VARIANTS[name]))}), flush=True)
