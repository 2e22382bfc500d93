"""The attention kernel fits the GPUs that its tiles are chosen for: compiled for them, which needs no GPU.

`python -m tests.gpu.compile_attend` compiles and shows more variants than the few that are tested here.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
import triton

from longspan.attention.backends.triton import hopper
from tests.gpu import compile_attend

VARIANTS = (  # a sample: each takes 2 to 10 s where nothing is in Triton's cache
    "decode 128", "decode 128 gathered", "decode latent, 128 heads, gathered", "prefill 64@89", "decode 128@120",
)  # fmt: skip
WIDEST = (  # of each row of the table of tiles: what takes most shared memory
    "decode 64", "decode 256", "verify 128", "verify 256", "prefill 192", "prefill 256", "prefill 256 int8",
    "diagonal of expanded latents", "decode latent fp8, 128 heads",
)  # fmt: skip
REGISTERS = 65536  # of a processor


def lines_of(module, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(*variants):
    found = lines_of("tests.gpu.compile_attend", *variants)
    assert len(found) == len(variants)
    return found


@pytest.fixture(scope="module")
def variants():
    return compiled(*VARIANTS)


def test_tiles_in_flight_fit_shared_memory_as_often_as_planned(variants):
    for variant in variants:
        assert variant["shared"] * variant["resident"] <= variant["limit"], variant


def test_registers_suffice_for_the_programs_that_are_planned_to_run_at_once(variants):
    for variant in variants:
        assert variant["registers"] * variant["warps"] * 32 * variant["resident"] <= REGISTERS, variant


def test_only_rows_of_512_values_and_the_largest_tiles_spill(variants):
    for variant in variants:
        largest = variant["block_m"] * variant["block_n"] >= 128 * 128
        assert variant["stack"] == 0 or "latent" in variant["variant"] or largest, variant


def test_a_launch_for_adjacent_and_gathered_slots_takes_what_one_for_adjacent_slots_takes(variants):
    adjacent, both = (next(v for v in variants if v["variant"] == f"decode 128{which}") for which in ("", " gathered"))
    assert both["shared"] == adjacent["shared"]
    assert both["registers"] <= adjacent["registers"] + 50


def test_unquantised_half_precision_uses_the_matrix_instructions_of_a_warp_group(variants):
    for variant in variants:
        if variant["arch"] == 90 and not any(word in variant["variant"] for word in ("int8", "fp8", "fp32")):
            assert variant["wgmma"] and not variant["mma"], variant


def latents_keep_results_in_registers(*variants):
    for variant in lines_of("tests.gpu.compile_latents", *variants):
        assert variant["shared"] <= compile_attend.Chip.LARGE.value, variant
        # none by versions that it is used with; results of one tile are 512 bytes a thread
        assert variant["stack"] <= (0 if triton.__version__[:3] in hopper.VERSIONS else 128), variant
        assert variant["wgmma"] and not variant["mma"], variant
        assert variant["waits"] and not variant["stores_before_it"], variant


def test_the_kernel_of_latents_keeps_results_in_registers():
    latents_keep_results_in_registers("gathered")


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_the_kernel_of_latents_keeps_results_in_registers_in_every_variant():
    latents_keep_results_in_registers()


def test_kernels_that_are_launched_early_wait_before_they_store(variants):
    """Without the wait a kernel could store where the kernels before it still read."""
    for variant in variants:
        assert variant["waits"] == (variant["arch"] >= compile_attend.H100), variant
        assert not variant["waits"] or not variant["stores_before_it"], variant


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_the_widest_rows_of_every_kind_of_tile_fit_shared_memory():
    for variant in compiled(*WIDEST):
        assert variant["shared"] <= variant["limit"], variant


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", compile_attend.CHIPS)
def test_every_entry_that_a_model_can_reach_fits_every_chip(arch):
    for variant in compiled(*(f"{name}@{arch}" for name in compile_attend.VARIANTS)):
        assert variant["shared"] * variant["resident"] <= variant["limit"], variant
        assert variant["registers"] * variant["warps"] * 32 * variant["resident"] <= REGISTERS, variant
