"""The write kernel stores what the plain writer stores, quantised as `rows.quantise` does it."""

import os
import subprocess
import sys

import pytest
import torch

from longspan.attention.pool import SlotWriter
from longspan.attention.rows import CacheRows, quantise
from longspan.attention.step_buffer import StepBuffer
from longspan.plan.view import WriteRun

pytest.importorskip("triton")

from longspan.attention.backends.triton.write import TritonWriter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SLOTS, ROWS, HEADS = 40, 11, 3
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from longspan.attention.backends.triton.merge import _merge_kernel
from longspan.attention.backends.triton.write import _write_kernel

def build(kernel, arguments, constants):
    names = kernel.arg_names
    signature = dict(zip(names, [*arguments, *["constexpr"] * len(constants)], strict=True))
    constants = {(names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

ints = lambda count: ("i32",) * count
for parts in (2, 16):
    pointers = ("*fp32",) * parts
    arguments = [pointers, pointers, (ints(2),) * parts, "*fp32", "*fp32", "i32"]
    build(_merge_kernel, arguments, {"WIDTH": 80, "COLUMNS": 128, "ROWS": 8})
for stored, widths, largest in (("bf16", (512, 64), 0.0), ("i8", (128,), 127.0), ("fp8e4nv", (512, 64), 448.0)):
    scales = "*fp32" if largest else "*bf16"
    arguments = ["*i32", "*bf16", "*bf16", "*" + stored, scales, ints(4), ints(3), ints(3), "i32", "i32"]
    constants = {"WIDTHS": widths, "LARGEST": largest, "ROUND": stored == "i8", "ROWS": 4, "EARLY": True}
    build(_write_kernel, arguments, constants)
"""
WRITES = (WriteRun(0, 7, 4), WriteRun(5, 30, 1), WriteRun(8, 1, 3))


def cache(dtype, kv_factor, groups, width, device=DEVICE):
    values = torch.full((kv_factor, HEADS, SLOTS, width), 3.0).to(dtype).to(device)
    quantised = dtype in (torch.int8, torch.float8_e4m3fn)
    scales = torch.full((kv_factor, HEADS, SLOTS, len(groups)), 9.0, device=device) if quantised else None
    return CacheRows(values, scales, groups if quantised else ())


def rows(width, dtype=torch.bfloat16, count=ROWS):
    generator = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, count, HEADS, width, generator=generator).mul_(5).to(dtype)
    k[2, 1] = 0.0
    return k, v


def assert_same(found, expected):
    assert torch.equal(found.values.cpu().float(), expected.values.float())
    if expected.scales is not None:
        assert torch.equal(found.scales.cpu(), expected.scales)


def written(writer_rows, target, k, v, writes=WRITES):
    """What the plain form stores, computed on the CPU."""
    expected = CacheRows(
        target.values.cpu().clone(), None if target.scales is None else target.scales.cpu().clone(), target.groups
    )
    SlotWriter(writes, writer_rows, CPU).write(expected, k, v)
    return expected


@pytest.mark.parametrize("kv_factor, groups", [(2, (24,)), (1, (16, 8)), (1, (24,)), (2, (64,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_land_in_their_slots_and_no_other_slot_changes(dtype, kv_factor, groups):
    target = cache(dtype, kv_factor, groups, sum(groups))
    k, v = rows(sum(groups))
    expected = written(ROWS, target, k, v)
    TritonWriter(WRITES, ROWS, DEVICE).write(target, k.to(DEVICE), v.to(DEVICE))
    assert_same(target, expected)


@pytest.mark.parametrize("kv_factor, groups", [(2, (24,)), (1, (16, 8))])
def test_fp8_scales_are_those_of_the_plain_form_and_so_are_values_that_need_no_rounding(kv_factor, groups):
    """Triton's interpreter rounds to 8 bits in its own way: what is rounded is compared on a GPU, below."""
    target = cache(torch.float8_e4m3fn, kv_factor, groups, sum(groups))
    exact = torch.randint(-15, 16, (2, ROWS, HEADS, sum(groups)), generator=torch.Generator().manual_seed(3)).float()
    exact[..., 0], exact[..., -1] = 14.0, -14.0  # a group's largest: its scale is 2^-5, exactly
    k, v = exact.clamp_(-14, 14)
    expected = written(ROWS, target, k, v)
    TritonWriter(WRITES, ROWS, DEVICE).write(target, k.to(DEVICE), v.to(DEVICE))
    assert_same(target, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kv_factor, groups", [(2, (128,)), (1, (512, 64)), (2, (80,))])
def test_quantised_values_are_those_of_the_plain_form_bit_for_bit(dtype, kv_factor, groups):
    target = CacheRows(
        torch.zeros(kv_factor, HEADS, 5000, sum(groups), device="cuda").to(dtype),
        torch.zeros(kv_factor, HEADS, 5000, len(groups), device="cuda"),
        groups,
    )
    k, v = rows(sum(groups), count=4000)
    TritonWriter((WriteRun(0, 500, 4000),), 4000, DEVICE).write(target, k.cuda(), v.cuda())
    values, scales = quantise(k.transpose(0, 1), dtype, groups)
    assert torch.equal(target.scales[0, :, 500:4500].cpu(), scales)
    assert torch.equal(target.values[0, :, 500:4500].cpu().float(), values.float())


def test_halves_are_rounded_to_even():
    target = cache(torch.int8, 1, (8,), 8)
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]).expand(ROWS, HEADS, 8)
    TritonWriter((WriteRun(0, 0, 1),), ROWS, DEVICE).write(target, k.to(DEVICE), k)
    assert target.values[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_keys_and_values_that_are_slices_of_one_projection():
    target = cache(torch.bfloat16, 2, (), 16)
    fused = torch.randn(ROWS, 3 * HEADS, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    _, k, v = fused.to(DEVICE).split(HEADS, dim=1)
    expected = written(ROWS, target, k.cpu(), v.cpu())
    TritonWriter(WRITES, ROWS, DEVICE).write(target, k, v)
    assert_same(target, expected)


def test_a_latent_cache_takes_keys_alone():
    target = cache(torch.bfloat16, 1, (), 24)
    k, _ = rows(24)
    expected = written(ROWS, target, k, k)
    TritonWriter(WRITES, ROWS, DEVICE).write(target, k.to(DEVICE), k.to(DEVICE)[..., :0])
    assert_same(target, expected)


def test_a_refilled_writer_writes_the_new_step_only():
    target = cache(torch.bfloat16, 2, (), 16)
    k, v = rows(16)
    buffer = StepBuffer(DEVICE)
    writer = TritonWriter(WRITES, ROWS, DEVICE, buffer)
    writer.refill((WriteRun(1, 20, 2),))
    buffer.send()
    expected = written(ROWS, target, k, v, (WriteRun(1, 20, 2),))
    writer.write(target, k.to(DEVICE), v.to(DEVICE))
    assert_same(target, expected)


def test_a_step_without_writes_changes_nothing():
    target = cache(torch.bfloat16, 2, (), 16)
    before = target.values.clone()
    TritonWriter((), ROWS, DEVICE).write(target, *(x.to(DEVICE) for x in rows(16)))
    TritonWriter((), 0, DEVICE).write(target, *(x[:0].to(DEVICE) for x in rows(16)))
    assert torch.equal(target.values, before)


def test_another_number_of_rows_is_an_error():
    with pytest.raises(ValueError, match="10 rows for a writer of 11"):
        TritonWriter(WRITES, ROWS, DEVICE).write(cache(torch.bfloat16, 2, (), 16), *rows(16, count=10))


def test_the_kernels_that_move_memory_compile_for_a_gpu_without_one():
    """The interpreter takes what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_captured_launch_is_replayed_for_another_step():
    target = cache(torch.bfloat16, 2, (), 16)
    k, v = (x.cuda() for x in rows(16))
    buffer = StepBuffer(DEVICE)
    writer = TritonWriter((), ROWS, DEVICE, buffer)
    writer.write(target, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        writer.write(target, k, v)
    expected = written(ROWS, target, k.cpu(), v.cpu())
    writer.refill(WRITES)
    buffer.send()
    graph.replay()
    assert_same(target, expected)


@pytest.mark.gpu
def test_slots_beyond_32_bit_offsets():
    values = torch.zeros(2, 8, 1_200_000, 128, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(1, 8, 128, device="cuda").bfloat16()
    TritonWriter((WriteRun(0, 1_199_999, 1),), 1, DEVICE).write(CacheRows(values), k, -k)
    assert torch.equal(values[0, :, -1], k[0])
    assert torch.equal(values[1, :, -1], -k[0])
