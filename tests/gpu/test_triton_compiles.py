"""The attention kernel fits an H100 or H200: compiled for it, which needs no GPU.

`python -m tests.gpu.compile_attend` compiles and shows more variants than the few that are tested here.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

VARIANTS = (
    "decode 128", "decode 128 int8", "decode latent, 128 heads", "decode latent fp8, 16 heads",
    "diagonal of latents, 128 heads", "prefill 128",
)  # fmt: skip
WIDEST = (  # of each row of the table of tiles: what takes most shared memory
    "decode 64", "decode 256", "verify 128", "verify 256", "prefill 192", "prefill 256", "prefill 256 int8",
    "diagonal of expanded latents", "decode latent fp8, 128 heads",
)  # fmt: skip
SHARED = 227 * 1024  # bytes of a processor's shared memory that one program can have


def compiled(*variants):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compile_attend", *variants]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def variants():
    return compiled(*VARIANTS)


def test_tiles_in_flight_fit_shared_memory_as_often_as_planned(variants):
    assert len(variants) == len(VARIANTS)
    for variant in variants:
        assert variant["shared"] * variant["resident"] <= SHARED, variant


def test_registers_suffice_for_the_programs_that_are_planned_to_run_at_once(variants):
    for variant in variants:
        assert variant["registers"] * variant["warps"] * 32 * variant["resident"] <= 65536, variant


def test_only_rows_of_512_values_spill(variants):
    for variant in variants:
        assert variant["stack"] == 0 or "latent" in variant["variant"], variant


def test_unquantised_half_precision_uses_the_matrix_instructions_of_a_warp_group(variants):
    for variant in variants:
        if not any(word in variant["variant"] for word in ("int8", "fp8", "fp32")):
            assert variant["wgmma"] and not variant["mma"], variant


@pytest.mark.slow
def test_the_widest_rows_of_every_kind_of_tile_fit_shared_memory():
    found = compiled(*WIDEST)
    assert len(found) == len(WIDEST)
    for variant in found:
        assert variant["shared"] <= SHARED, variant
