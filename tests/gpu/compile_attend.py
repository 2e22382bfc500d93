"""Compiles the attention kernel for a GPU without one, and says what it takes, one JSON object a variant.

`python -m tests.gpu.compile_attend [variant[@architecture]]...`, without the variable that asks for Triton's
interpreter; the architecture is that of an H100 if none is named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.attention.backends.triton import backend
from longspan.attention.backends.triton.attend import attend_kernel
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.backends.triton.config import (
    FUSED,
    PARTS,
    Chip,
    Config,
    Shape,
    config_for,
    rows_at_once,
    shape_of,
)
from longspan.attention.backends.triton.plan import ITEM_FIELDS
from longspan.attention.prepared import DiagonalRows
from longspan.attention.variants import AttentionOps, Heads, MultiHeadLatentVariant
from longspan.attention.workload import ExpansionCost
from longspan.parallel.heads import HeadBlock

LATENT = (512, 64)
H100 = 90
CHIPS = {80: Chip.MEDIUM, 89: Chip.SMALL, H100: Chip.LARGE, 100: Chip.LARGE, 120: Chip.SMALL}


class Latents:
    """Rows as wide as DeepSeek-V3's, and maps of the right shapes: no numbers matter here."""

    value_dim = 128

    def absorb(self, q: Tensor) -> Tensor:
        return q.new_zeros(*q.shape[:2], sum(LATENT))

    def values(self, latents: Tensor) -> Tensor:
        return latents[..., : self.value_dim]


def diagonal_of_latents(heads: int) -> tuple[Shape, int, str, bool]:
    """What the engine launches for a segment of two tokens against itself: asked of its own code, not repeated here."""
    blocks = (HeadBlock(0, heads, 0, 1),)
    cpu = torch.device("cpu")
    ops = AttentionOps(TritonBackend(cpu, LATENT[0]), Heads(blocks, blocks, ()), 0.1, LATENT[0], ExpansionCost())
    q, row = (torch.zeros(2, count, width, dtype=torch.bfloat16) for count, width in ((heads, 192), (1, sum(LATENT))))
    with patch.object(backend, "_launch") as launch:
        diagonal = DiagonalRows(0, 2, False, ops.backend.prepare_diagonal(((0, 2),), 2, None))
        MultiHeadLatentVariant(ops, Latents()).diagonal(q, row, row, diagonal)
    _, keys, *_, rows = launch.call_args.args
    return keys.shape, rows, "bf16", False


VARIANTS: dict[str, tuple[Shape, int, str, bool]] = {  # the shape, rows of a run, what is cached, gathered slots too
    "decode 64": (shape_of(64, 64, (), False, False), 8, "bf16", False),
    "decode 128": (shape_of(128, 128, (), False, False), 8, "bf16", False),
    "decode 128 gathered": (shape_of(128, 128, (), False, False), 8, "bf16", True),
    "decode 128 int8": (shape_of(128, 128, (128,), False, False), 8, "i8", False),
    "decode 128 fp8": (shape_of(128, 128, (128,), False, False), 8, "fp8e4nv", False),
    "decode 256": (shape_of(256, 256, (), False, False), 8, "bf16", False),
    "decode latent, 16 heads": (shape_of(576, 512, (), True, False), 16, "bf16", False),
    "decode latent, 128 heads": (shape_of(576, 512, (), True, False), 128, "bf16", False),
    "decode latent, 128 heads, gathered": (shape_of(576, 512, (), True, False), 128, "bf16", True),
    "verify latent, 16 heads": (shape_of(576, 512, (), True, False), 48, "bf16", False),
    "decode latent fp8, 16 heads": (shape_of(576, 512, LATENT, True, False), 16, "fp8e4nv", False),
    "decode latent fp8, 128 heads": (shape_of(576, 512, LATENT, True, False), 128, "fp8e4nv", False),
    "diagonal of latents, 8 heads": diagonal_of_latents(8),
    "diagonal of latents, 128 heads": diagonal_of_latents(128),
    "verify 256": (shape_of(256, 256, (), False, False), 64, "bf16", False),
    "verify 128": (shape_of(128, 128, (), False, False), 64, "bf16", False),
    "prefill 64": (shape_of(64, 64, (), False, False), 4096, "bf16", False),
    "prefill 128": (shape_of(128, 128, (), False, False), 4096, "bf16", False),
    "prefill 128 int8": (shape_of(128, 128, (128,), False, False), 4096, "i8", False),
    "prefill 192": (shape_of(192, 192, (), False, False), 4096, "bf16", False),
    "prefill 256": (shape_of(256, 256, (), False, False), 4096, "bf16", False),
    "prefill 256 int8": (shape_of(256, 256, (256,), False, False), 4096, "i8", False),
    "diagonal of expanded latents": (shape_of(192, 128, (), False, False), 4096, "bf16", False),
    "decode 128 fp32": (shape_of(128, 128, (), False, True), 8, "fp32", False),
    "decode latent fp32": (shape_of(576, 512, (), True, True), 128, "fp32", False),
}


def compile_variant(shape: Shape, config: Config, cached: str, gathered: bool, arch: int = H100):
    """The kernel for an architecture, told what a launch would tell of it: pointers and strides are multiples of 16."""
    scales = "*fp32" if shape.groups else f"*{cached}"
    key, value = shape.key[0] + shape.key[2], shape.value[0] + shape.value[2]
    constants = {
        "KEY": shape.key, "VALUE": shape.value, "SHARED": shape.shared, "GROUPS": shape.groups,
        "STRIDES": (key, key if shape.shared else value, max(1, shape.groups)), "GATHERED": gathered,
        "FLIP": config.flip, "SPLIT": config.split, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "FIELDS": ITEM_FIELDS, "MERGES": config.merges, "PARTS": PARTS, "ROWS": rows_at_once(config, value),
        "EARLY": arch >= H100,
    }  # fmt: skip
    types: dict[str, object] = {
        **dict.fromkeys(("items", "gathered", "counts", "arrived", "bounds", "index"), "*i32"),
        "adjacent": "i32",
        "q": "*fp32" if shape.wide else "*bf16",
        "kv": (f"*{cached}", f"*{cached}", scales, scales),
        "out": "*fp32" if shape.wide else "*bf16",
        **dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32"),
        "q_strides": ("i32",) * 2, "head_strides": ("i32",) * 3, "out_strides": ("i32",) * 3,
        "first_heads": ("i32",) * 2, "group": "i32", "heads": "i32", "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    names = attend_kernel.arg_names
    plain = ["items", "gathered", "counts", "arrived", "bounds", "index", "q", "out", "lse", "part_out", "part_lse"]
    aligned = [(names.index(name),) for name in plain]
    tuples = {"kv": 4, "q_strides": 2, "head_strides": 2 if shape.groups else 3, "out_strides": 2}
    aligned += [(names.index(name), at) for name, count in tuples.items() for at in range(count)]
    source = ASTSource(
        attend_kernel,
        {name: types[name] for name in names},
        {(names.index(name),): constant for name, constant in constants.items()},
        {at: [["tt.divisibility", 16]] for at in aligned},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": FUSED}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread (spills), bytes of shared memory, matrix instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
        "waits": ptx.count("griddepcontrol.wait"),
        "stores_before_it": len(re.findall(r"st\.global|atom\.global", ptx.partition("griddepcontrol.wait")[0])),
    }  # fmt: skip


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VARIANTS:
        name, _, named = wanted.partition("@")
        arch = int(named or H100)
        shape, rows, cached, gathered = VARIANTS[name]
        if cached == "fp8e4nv" and arch < 89:
            cached = "i8"  # the processor has no 8-bit floats
        config = config_for(shape, rows, CHIPS[arch])
        found = resources(compile_variant(shape, config, cached, gathered, arch))
        limit = CHIPS[arch].value
        print(json.dumps({"variant": name, "arch": arch, "limit": limit, **vars(config), **found}), flush=True)
