"""`longspan bench attention|merge|kv-write|moe|linear` on small cases: what is counted, and what cannot be measured."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from scripts.summarise_kernels import main as summarise
from scripts.summarise_kernels import targets
from typer.testing import CliRunner

from longspan.bench.kernels.attention import HEADS, AttentionCase, run_shards
from longspan.bench.kernels.ceilings import Ceilings
from longspan.bench.kernels.harness import Harness, as_json
from longspan.cli import bench_kernels
from longspan.cli.main import build_app
from longspan.clock import Clock, Timing
from longspan.errors import ConfigError
from tests.oracle import tiny_folder

CEILINGS = Ceilings(copy=2e12, matmul=4e12)
SMALL = {"heads": "mha", "seconds": 0.001, "as_json": True}


class OneSecond:
    """A clock that runs the function once and says a second."""

    def time(self, function):
        function()
        return Timing(1.0, 1.0, 1)


def harness(dtype=torch.bfloat16):
    return Harness(torch.device("cpu"), dtype, OneSecond(), CEILINGS, (), lambda text: None)


def report(capsys):
    return json.loads(capsys.readouterr().out)


def test_attention_measures_decode_prefill_and_shards_in_every_backend(capsys):
    bench_kernels.attention_kernel(batch="1,2", cached="24", prefill="4x16", shared_context=40, shards=3, **SMALL)
    found = report(capsys)
    assert {row["backend"] for row in found["rows"]} == {"cpu", "torch"}
    kernels = [row["kernel"] for row in found["rows"] if row["backend"] == "torch"]
    assert kernels == ["decode", "decode", "prefill", "whole", "shard", "shard", "shard", "merge"]
    assert all(row["median"] >= row["best"] > 0 for row in found["rows"])
    assert found["ceilings"]["copy"] > 0 and found["ceilings"]["matmul"] > 0
    shared = found["shared"]["mha auto cpu"]
    measured = [row["median"] for row in found["rows"] if row["kernel"] == "shard" and row["backend"] == "cpu"]
    assert shared["shards"] == measured and len(measured) == 3


def test_shards_and_merge_are_reported_as_parts_of_the_whole():
    seconds = iter([10.0, 2.0, 4.0, 3.0, 1.0])  # the whole, three shards, the merge

    class Clock:
        def time(self, function):
            function()
            taken = next(seconds)
            return Timing(taken, taken, 1)

    scene = AttentionCase(HEADS["mha"], "auto", 1, 1, 40)
    rows, shared = run_shards(replace(harness(), clock=Clock(), backends=("torch",)), scene, shards=3)
    assert [row.timing.median for row in rows] == [10, 2, 4, 3, 1]
    assert (shared["torch"].slowest_share, shared["torch"].merge_share) == (0.4, 0.1)


def test_attention_reads_quantised_caches_and_latents(capsys):
    bench_kernels.attention_kernel(
        heads="mla", formats="fp8,int8", batch="1", cached="8", prefill="", shared_context=0, backends="torch",
        seconds=0.001, as_json=True,
    )  # fmt: skip
    assert [(row["format"], row["heads"]) for row in report(capsys)["rows"]] == [("fp8", "mla"), ("int8", "mla")]


def test_a_row_of_attention_is_repeated_by_its_command(capsys):
    """The arguments that the command gives measure the row again, and nothing else."""
    bench_kernels.attention_kernel(
        heads="mha", batch="1,2", cached="8", prefill="4x8", shared_context=0, backends="torch", seconds=0.001,
        as_json=True,
    )  # fmt: skip
    for row in report(capsys)["rows"]:
        given = shlex.split(row["command"])
        assert given[:3] == ["longspan", "bench", "attention"]
        done = CliRunner().invoke(build_app(), [*given[1:], "--seconds", "0.001", "--json"])
        (again,) = json.loads(done.stdout)["rows"]
        same = ("kernel", "heads", "format", "batch", "new", "cached", "backend", "bytes", "flops")
        assert [again[name] for name in same] == [row[name] for name in same]


def test_merge_measures_states_as_they_arrive_and_as_they_are_made(capsys):
    bench_kernels.merge(tokens="2", parts=3, backends="cpu,torch", **SMALL)
    rows = report(capsys)["rows"]
    assert [(row["layout"], row["backend"]) for row in rows] == [
        ("packed", "cpu"), ("packed", "torch"), ("whole", "cpu"), ("whole", "torch"),
    ]  # fmt: skip
    assert rows[0]["bytes"] == 4 * (3 + 1) * 2 * 16 * 129


def test_kv_write_measures_every_format(capsys):
    bench_kernels.kv_write(rows="20", backends="cpu", **SMALL)
    rows = report(capsys)["rows"]
    assert [row["format"] for row in rows] == ["auto", "fp8", "int8"]
    elements = 20 * 2 * 16 * 128
    assert rows[0]["bytes"] == elements * (4 + 4)
    assert rows[1]["bytes"] == elements * (4 + 1) + 20 * 2 * 16 * 4


def test_moe_counts_the_chosen_experts_once_and_tells_the_error(capsys):
    bench_kernels.moe(shape="4x4x32x16", rows="1,3", seconds=0.001, as_json=True)
    found = report(capsys)
    assert [(row["kernel"], row["rows"], row["backend"]) for row in found["rows"]] == [
        ("mixture", 1, "loop"), ("mixture", 3, "loop"),
    ]  # fmt: skip
    each = 3 * 32 * 16
    assert [row["bytes"] for row in found["rows"]] == [4 * (4 * each + 2 * rows * 32) for rows in (1, 3)]
    assert [row["flops"] for row in found["rows"]] == [2 * rows * 4 * each for rows in (1, 3)]
    assert found["errors"].keys() == {"1 rows loop", "3 rows loop"}
    assert all(0 < error < 1e-5 for error in found["errors"].values())


@pytest.mark.parametrize(("weights", "bits", "error"), [("fp8", 8 + 32 / 128**2, 0.1), ("mxfp4", 4.25, 1e-5)])
def test_moe_counts_experts_as_they_are_stored_and_tells_how_to_repeat(capsys, weights, bits, error):
    bench_kernels.moe(shape="2x2x128x128", rows="3", weights=weights, seconds=0.001, as_json=True)
    found = report(capsys)
    (row,) = found["rows"]
    assert row["bytes"] == int(2 * 3 * 128 * 128 * bits / 8) + 4 * 2 * 3 * 128
    assert 0 < found["errors"]["3 rows loop"] < error
    assert row["command"] == f"longspan bench moe --device cpu --shape 2x2x128x128 --rows 3 --weights {weights}"


def test_linear_measures_every_form_and_tells_bytes_operations_errors_and_how_to_repeat(capsys):
    bench_kernels.linear(shapes="64x32", rows="1,3", seconds=0.001, as_json=True)
    found = report(capsys)
    rows = {(row["rows"], row["backend"]): row for row in found["rows"]}
    sizes = {"plain": 4, "packed": 4, "panels": 4, "blocks": 0.75, "fp16": 2, "int8": 1}
    assert list(rows) == [(count, name) for count in (1, 3) for name in sizes]
    for (count, name), row in rows.items():
        assert row["bytes"] == sizes[name] * 64 * 32 + 4 * count * (64 + 32)
        assert row["flops"] == 2 * count * 64 * 32
    for name, error in found["errors"].items():
        assert error == max(row["error"] for row in rows.values() if row["backend"] == name)
        assert 0 < error < {"blocks": 0.2, "fp16": 2e-3, "int8": 5e-2}.get(name, 1e-5)
    assert "fp16" not in found["errors"] or found["errors"]["fp16"] < found["errors"]["int8"]


def test_a_row_of_linear_is_measured_alone_by_its_command(capsys):
    bench_kernels.linear(shapes="64x32,32x64", rows="1,3", forms="plain", seconds=0.001, as_json=True)
    given = report(capsys)["rows"][-1]["command"].split()
    assert given[:3] == ["longspan", "bench", "linear"]
    options = dict(zip(given[3::2], given[4::2], strict=True))
    assert options == {"--device": "cpu", "--shapes": "32x64", "--rows": "3", "--forms": "plain"}


def test_linear_takes_the_products_of_a_model(capsys):
    bench_kernels.linear(model=tiny_folder("llama"), rows="1", forms="plain", seconds=0.001, as_json=True)
    assert report(capsys)["shapes"] == [[97, 48], [128, 48], [48, 96], [160, 48], [48, 80]]


@pytest.mark.parametrize("format, row_bytes", [("auto", 2 * 8 * 128 * 2), ("fp8", 2 * 8 * (128 + 4))])
def test_decode_counts_the_cache_the_queries_and_the_results(format, row_bytes):
    moved, operations = AttentionCase(HEADS["gqa"], format, 3, 1, 100).size(harness())
    assert moved == 3 * 100 * row_bytes + 3 * 64 * (128 * 2 + 129 * 4)
    assert operations == 3 * 100 * 64 * 2 * (128 + 128)


def test_latents_are_counted_once():
    moved, operations = AttentionCase(HEADS["mla"], "auto", 1, 1, 1000).size(harness())
    assert moved == 1000 * 576 * 2 + 128 * (576 * 2 + 513 * 4)
    assert operations == 1000 * 128 * 2 * (576 + 512)


def test_a_row_tells_rates_and_shares_of_the_ceilings():
    row = harness().measure({"kernel": "merge"}, "torch", (10**12, 10**12), lambda: None)
    plain = as_json(row, CEILINGS)
    assert plain["bytes_per_s"] == 1e12
    assert plain["share_of_copy"] == 0.5
    assert plain["share_of_matmul"] == 0.25


def test_a_kernel_that_fails_is_a_row_that_says_so():
    def fails():
        raise RuntimeError("out of registers")

    plain = as_json(harness().measure({"kernel": "merge"}, "torch", (1, 1), fails), CEILINGS)
    assert plain["problem"] == "RuntimeError: out of registers"
    assert "median" not in plain


def test_a_case_larger_than_the_memory_is_a_row_that_says_so(capsys):
    bench_kernels.attention_kernel(batch="64", cached=str(1 << 30), prefill="", shared_context=0, **SMALL)
    (row,) = report(capsys)["rows"]
    assert row["problem"].startswith("needs 1")
    assert row["problem"].endswith("are free")


def test_the_clock_stays_within_its_budget_and_repeats_three_times_at_least():
    calls = []
    assert Clock(0.0).time(lambda: calls.append(1)).runs == 3
    assert Clock(1.0).time(lambda: None).runs == 100


@pytest.mark.parametrize(
    "command, options, message",
    [
        (bench_kernels.merge, {"device": "tpu"}, "device=tpu: unknown choice"),
        (bench_kernels.merge, {"backends": "fast"}, "backends=fast: is unknown"),
        (bench_kernels.merge, {"backends": "triton"}, "attention_backend=triton: needs a cuda device, not cpu"),
        (bench_kernels.merge, {"parts": 1}, "parts=1: leaves nothing to merge"),
        (bench_kernels.merge, {"tokens": "0"}, "tokens=0: must be at least 1"),
        (bench_kernels.merge, {"heads": "many"}, "heads=many: unknown choice"),
        (bench_kernels.merge, {"seconds": 0.0}, "seconds=0.0: must be positive"),
        (bench_kernels.moe, {"shape": "8x2x64"}, "shape=8x2x64: is not experts x choices x hidden x width"),
        (bench_kernels.moe, {"shape": "2x4x64x64"}, "shape=2x4x64x64: lets a row choose 4 of 2 experts"),
        (
            bench_kernels.moe,
            {"shape": "2x2x64x128", "weights": "fp8"},
            "shape=2x2x64x128: has widths that are no multiple of 128, as fp8 needs",
        ),
        (bench_kernels.linear, {"shapes": "64"}, "shapes=64: is not outputs x inputs"),
        (bench_kernels.linear, {"shapes": "0x64"}, "shapes=0x64: is not outputs x inputs"),
        (bench_kernels.linear, {"forms": "int4"}, "forms=int4: unknown choice"),
        (bench_kernels.linear, {"model": "m", "shapes": "1x1"}, "model=m: gives the weights, and so does --shapes"),
        (bench_kernels.kv_write, {"formats": "int2"}, "kv_cache_dtype=int2: unknown choice"),
        (bench_kernels.attention_kernel, {"prefill": "12"}, "prefill=12: is not new x cached tokens"),
        (
            bench_kernels.attention_kernel,
            {"shared_context": 3},
            "shared_context=3: is less than one token for each shard",
        ),
    ],
)
def test_options_that_cannot_be(command, options, message):
    with pytest.raises(ConfigError) as error:
        command(**options)
    assert message in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ConfigError, match="device=cuda: PyTorch sees no such device"):
        bench_kernels.merge(device="cuda")


def row(kernel, of_copy, of_matmul=0.1, moved=2e9, **more):
    shares = {"share_of_copy": of_copy, "share_of_matmul": of_matmul, "bytes": moved, "median": 1e-3}
    rates = {"bytes_per_s": 1e12, "flops_per_s": 1e12}
    return {"kernel": kernel, "backend": "triton", "format": "auto", "heads": "gqa", **shares, **rates, **more}


def reported(rows, **more):
    return {"part": {"device": "some", "ceilings": {"copy": 4e12, "matmul": 8e14}, "rows": rows, **more}}


def met(rows, **more):
    return {target.name: (target.measured, target.met) for target in targets(reported(rows, **more))}


def test_targets_hold_the_worst_case_to_account():
    found = met(
        [
            row("decode", 0.9), row("decode", 0.8), row("decode", 0.1, moved=1e6),
            row("decode", 0.5, 0.9, heads="mla"), row("decode", 0.0, backend="torch"),
            row("merge", 0.1, layout="packed", tokens=1), row("merge", 0.85, layout="packed", tokens=9),
            row("prefill", 0.0, 0.7),
        ]
    )  # fmt: skip
    assert found == {
        "gqa decode over 1 GB: share of its ceiling": (0.8, "no"),
        "mla decode over 1 GB: share of its ceiling": (0.9, "yes"),
        "merge at the largest batch: share of copy": (0.85, "yes"),
        "prefill off the diagonal: share of matmul": (0.7, "yes"),
    }


def test_a_case_that_failed_misses_its_target():
    failed = {"kernel": "prefill", "heads": "gqa", "backend": "triton", "bytes": 1, "problem": "out of registers"}
    found = met([row("prefill", 0.0, 0.7), failed])
    assert found["prefill off the diagonal: share of matmul"] == (0.0, "no")


def test_targets_of_shards_are_upper_bounds():
    shares = {"gqa auto triton": {"slowest_share": 0.14, "merge_share": 0.01}}
    found = met([], shards=8, shared=shares)
    assert found["gqa auto triton: slowest of 8 shards, of the whole"] == (0.14, "no")
    assert found["gqa auto triton: merge, of the whole"] == (0.01, "yes")
    assert found["prefill off the diagonal: share of matmul"] == (None, "-")


def test_a_folder_of_reports_becomes_one_page_without_the_parts_that_failed(tmp_path, capsys):
    failed = {"kernel": "prefill", "backend": "torch", "problem": "no | such\nthing"}
    (tmp_path / "decode.json").write_text(json.dumps(reported([row("decode", 0.9), failed])["part"]))
    (tmp_path / "merge.json").write_text("")
    (tmp_path / "other.json").write_text("[1]")
    summarise(tmp_path)
    page = (tmp_path / "kernels.md").read_text()
    assert "## decode" in page and "## merge" not in page
    assert "| prefill | torch | no / such thing |" in page
    assert "decode over 1 GB" in capsys.readouterr().out
