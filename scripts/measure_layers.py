"""What other forms of a layer's pieces win: each piece in PyTorch's operations and in the other form, in turn.

The other forms are the kernels that the engine chooses on this device, torch.compile, and FP8 products.

    python scripts/measure_layers.py [--device auto] [--rows 1,32,2048] [--hidden 4096] [--wide 14336] [--seconds 0.3]

Prints a table and one JSON object; a ratio above 1 is the other form's win. FP8 is left out where PyTorch has no
product of its own for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial

import torch

from longspan.clock import make_clock
from longspan.engine.devices import resolve_device
from longspan.models.layers import DenseLinear
from longspan.models.ops import PlainOps, RopeTable, choose_ops
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear, dequantised, problem_of_kernel

HEAD_DIM = 128
Pair = tuple[str, Callable[[], object], Callable[[], object]]


def compiled(function: Callable[..., object], *given: object) -> Callable[[], object]:
    """The function after torch.compile, for any number of rows, made before it is timed."""
    made: Callable[..., object] = torch.compile(function, dynamic=True)
    made(*given)
    return lambda: made(*given)


def pointwise(rows: int, hidden: int, wide: int, device: torch.device, dtype: torch.dtype) -> Iterator[Pair]:
    """What lies between a layer's products."""
    x, weight = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, hidden), (hidden,)))
    heads = torch.randn(rows, hidden // HEAD_DIM, HEAD_DIM, device=device, dtype=dtype)
    table = RopeTable(*(torch.randn(rows, 1, HEAD_DIM, device=device, dtype=dtype) for _ in range(2)))
    both = torch.randn(rows, 2 * wide, device=device, dtype=dtype)
    plain, chosen = PlainOps(), choose_ops(device)
    given: dict[str, tuple[object, ...]] = {
        "norm": (x, weight, 1e-5), "add_norm": (x, x, weight, 1e-5), "rope": ((heads,), table), "swiglu": (both,),
    }  # fmt: skip
    for name, values in given.items():
        before = partial(getattr(plain, name), *values)
        if type(chosen) is not PlainOps:
            yield name, before, partial(getattr(chosen, name), *values)
        yield f"{name}, compiled", before, compiled(getattr(plain, name), *values)


def products(rows: int, hidden: int, wide: int, device: torch.device, dtype: torch.dtype) -> Iterator[Pair]:
    """A product with a plain weight, and with the same in FP8; activations are rounded within."""
    if problem := problem_of_kernel(device):
        print(f"fp8: {problem}")
        return
    values = torch.randn(wide, hidden, device=device).to(torch.float8_e4m3fn)
    scaled = BlockScaled(values, torch.rand(wide // BLOCK, hidden // BLOCK, device=device))
    plain, kept = DenseLinear(dequantised(scaled).to(dtype)), BlockScaledLinear(scaled, fused=True)
    x = torch.randn(rows, hidden, device=device, dtype=dtype)
    yield "fp8 product", lambda: plain(x), lambda: kept(x)


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", default="1,32,2048")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=14336)
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    device = torch.device(resolve_device(options.device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clock = make_clock(device, options.seconds)
    found = []
    for rows in map(int, options.rows.split(",")):
        for pieces in (pointwise, products):
            for name, plain, other in pieces(rows, options.hidden, options.wide, device, dtype):
                before, after = clock.time(plain).median, clock.time(other).median
                found.append({"piece": name, "rows": rows, "plain_us": before * 1e6, "other_us": after * 1e6,
                              "ratio": before / after})  # fmt: skip
                print(f"{name:18} {rows:6} rows: {before * 1e6:9.1f} and {after * 1e6:9.1f} us, {before / after:.2f}x")
    print(json.dumps({"device": str(device), "hidden": options.hidden, "wide": options.wide, "pieces": found}))


if __name__ == "__main__":
    main()
