"""Compiles the kernels of sampling for an H100 or H200 without one, and says what they take, one JSON object a kernel.

`python -m tests.gpu.compile_sampling [vocabulary]`, without the variable that asks for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.engine.rank.sampling import kernels
from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.request import SamplingParams
from tests.gpu.compile_attend import resources

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorded:
    """Stands for a kernel: compiles it for the arguments of a launch instead of launching it."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, **constants):
        given = dict(zip(self.kernel.arg_names, args, strict=False))
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        fixed = {name: None for name, value in given.items() if value is None}
        # as a launch does, but for the number of rows
        fixed |= {name: 1 for name in given.keys() - tensors.keys() - fixed.keys() - {"rows"} if given[name] == 1}
        types = {name: TYPES[tensors[name].dtype] if name in tensors else "i32" for name in given.keys() - fixed}
        constants |= fixed
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        names = self.kernel.arg_names
        whole = [name for name, kind in types.items() if kind[0] == "*" or (name != "rows" and given[name] % 16 == 0)]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
        source = ASTSource(
            self.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        name = self.kernel.fn.__name__.strip("_")
        print(json.dumps({"kernel": name, "warps": num_warps, **resources(compiled)}), flush=True)


def compile_all(vocabulary: int) -> None:
    """Compile what a batch with filters launches, then what one with temperatures does, and a greedy one."""
    cpu = torch.device("cpu")
    logits, positions = torch.zeros(3, vocabulary, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    recorded = {name: Recorded(getattr(kernels, name)) for name in names}
    with patch.multiple(kernels, early_options=lambda device: {"EARLY": True}, **recorded):
        for params in (SamplingParams(top_p=0.9, top_k=4), SamplingParams()):
            kernels.draw(logits, DrawParameters.of([params] * 3, [1, 2, 3], cpu), positions)
        kernels.draw(logits, None, None)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]) if len(sys.argv) > 1 else 128_256)
