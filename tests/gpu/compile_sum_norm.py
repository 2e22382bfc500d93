"""Compiles the sum with its norm for an H100 without one, and says what it takes, one JSON object a variant.

`python -m tests.gpu.compile_sum_norm [members,width]...`, without the variable that asks for Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.parallel.sum_norm import sum_norm_kernel, warps_of
from tests.gpu.compile_attend import resources

VARIANTS = ("2,4096", "4,2880", "8,4096", "8,7168", "8,8192", "8,16384")
HALF, WHOLE = "*bf16", "*i64"


def compiled(members: int, width: int):
    """The kernel as one launch of it compiles it."""
    block = triton.next_power_of_2(width)
    types = dict.fromkeys(("x", "residual", "weight", "total", "out", "own_areas"), HALF)
    types |= dict.fromkeys(("own_flags", "flags_at", "turns"), WHOLE) | {"own": "i32", "eps": "fp32"}
    types |= {"areas": (HALF,) * members, "strides": ("i32", "i32")}
    constants = {"WIDTH": width, "BLOCK": block, "MEMBERS": members, "AREA": 16384, "EARLY": True}
    names = sum_norm_kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    whole = [(names.index(name),) for name, kind in types.items() if isinstance(kind, str) and kind[0] == "*"]
    parts = [(names.index(name), n) for name in ("areas", "strides") for n in range(len(types[name]))]
    source = ASTSource(
        sum_norm_kernel, signature, {(names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in whole + parts},
    )  # fmt: skip
    options = {"num_warps": warps_of(block), "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def meeting(kernel) -> int:
    """Machine instructions from the barrier before the flags are set to the one after the loop that reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(.*?);", text, re.MULTILINE)
    barriers = [number for number, line in enumerate(lines) if "BAR.SYNC" in line]
    signal = next(number for number, line in enumerate(lines) if "ATOMG.E.EXCH" in line)
    first = max(number for number in barriers if number < signal)
    return [number for number in barriers if number > signal][2] - first + 1


if __name__ == "__main__":
    for variant in sys.argv[1:] or VARIANTS:
        members, width = map(int, variant.split(","))
        kernel = compiled(members, width)
        ptx = kernel.asm["ptx"]
        counts = {
            "signals": ptx.count("atom.global.sys.release.exch.b64"),
            "polls": ptx.count("atom.global.sys.acquire.add.u64"),
            "cached_loads": ptx.count("ld.global.nc"),
            "meeting": meeting(kernel),
        }
        print(json.dumps({"members": members, "width": width, **resources(kernel), **counts}), flush=True)
