"""Sum over members, addition and norm in one launch: the numbers of the sum followed by the norm, on every member.

Members are buffers of one process, whose launches run one after the other. So that none waits, flags say beforehand
that all members have come; each launch runs twice, and reads what the others have written in the first round.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from longspan.models.ops.triton import TritonOps
from longspan.parallel.sum_norm import SumNorm

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16  # Triton's interpreter does not round to bfloat16
EPS, MOST = 1e-5, 256 << 10


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, HALF)


def group(size):
    buffers = [torch.zeros(SumNorm.ELEMENTS, dtype=HALF, device=DEVICE) for _ in range(size)]
    return [SumNorm(buffers, own, MOST) for own in range(size)]


def computed(members, parts, residual, weight):
    """(total, its norm) on each member."""
    before = members[0]._turns.clone()
    for _ in range(2):
        for flags, member in zip(members[0]._flags, members, strict=True):
            flags.fill_(1 << 40)
            member._turns.copy_(before)
        found = [member(x, residual, weight, EPS) for member, x in zip(members, parts, strict=True)]
    return found


def in_order(parts):
    """Their sum in fp32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(HALF)


@pytest.mark.parametrize("width", [24, 2880])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_members_get_the_bits_of_a_sum_in_fp32_and_its_norm(size, width):
    """One row has a large number that goes away again: what is left of the others tells the order of summing."""
    parts = [random(3, width, seed=seed) for seed in range(size)]
    parts[0][1], parts[-1][1] = 1 << 15, -(1 << 15)
    residual, weight = random(3, width, seed=20), random(width, seed=21)
    expected = TritonOps().add_norm(in_order(parts), residual, weight, EPS)
    for found in computed(group(size), parts, residual, weight):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_strided_rows_of_any_number_and_width_follow_each_other():
    members = group(2)
    for turn, (rows, width) in enumerate([(5, 64), (1, 1024), (SumNorm.ROWS, 8), (5, 64), (2, 64)]):
        parts = [random(rows, 2 * width, seed=2 * turn + own)[:, :width] for own in range(2)]
        residual, weight = random(rows, 3 * width, seed=30)[:, width : 2 * width], random(width, seed=31)
        expected = TritonOps().add_norm(in_order(parts), residual, weight, EPS)
        for found in computed(members, parts, residual, weight):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert members[0]._turns[:6].tolist() == [5, 4, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("shape", "dtypes", "taken"),
    [
        ((1, 4096), {}, True),
        ((SumNorm.ROWS, 2048), {}, True),
        ((0, 4096), {}, False),
        ((SumNorm.ROWS + 1, 8), {}, False),
        ((33, 4096), {}, False),
        ((1, 16384), {}, True),
        ((1, 16392), {}, False),
        ((1, 100), {}, False),
        ((1, 64), {"x": torch.float32}, False),
        ((1, 64), {"residual": torch.float32}, False),
        ((1, 64), {"weight": torch.float32}, False),
    ],
    ids=["one", "many", "none", "a row more", "more bytes", "wide", "wider", "unaligned", "x", "residual", "weight"],
)
def test_other_sums_are_two_operations(shape, dtypes, taken):
    summing = SumNorm([torch.zeros(SumNorm.ELEMENTS, dtype=torch.bfloat16, device="meta")] * 2, 0, MOST)
    shapes = {"x": shape, "residual": shape, "weight": shape[1:]}
    dtypes = dict.fromkeys(shapes, torch.bfloat16) | dtypes
    given = {name: torch.zeros(shapes[name], dtype=dtypes[name], device="meta") for name in shapes}
    assert summing.takes(**given) == taken


def test_a_row_of_eight_members_is_loaded_at_once_after_one_meeting():
    """Compiled for an H100 without one: nothing is spilled, nor stored before the kernel before it has ended.

    Flags are set and read once by one thread each, in an order that the other GPUs see.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compile_sum_norm", "8,4096", "8,7168"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        kernel = json.loads(line)
        assert kernel["stack"] == kernel["stores_before_it"] == kernel["cached_loads"] == 0, kernel
        assert kernel["waits"] == kernel["signals"] == kernel["polls"] == 1, kernel
        assert kernel["registers"] <= 64, kernel
