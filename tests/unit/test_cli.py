"""The command line: options, results as one JSON object, and errors as one message."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from longspan.bench.contestants import ContestantTiming
from longspan.bench.latency import _rates
from longspan.bench.reference import transformers_reference
from longspan.cli.bench import _show_rates
from longspan.cli.explain import constants_line
from longspan.cli.generate import _Printer
from longspan.cli.main import build_app, main
from longspan.cli.reference import reference
from longspan.config import CostConstants
from longspan.models.registry import load_config
from longspan.request import CompletionOutput, RequestOutput
from longspan.scheduler.acceptance import DraftCounts
from longspan.version import __version__
from longspan.weights.builtin import builtin_config, builtin_names
from longspan.weights.source import resolve_model
from tests.oracle import greedy, oracle, prompt_of, tiny_folder
from tests.traffic import IN_PLACE, TRAVELLING

IDS = ",".join(map(str, prompt_of(33)))
ENGINE_OPTIONS = {
    "--ray-address", "--listen", "--cluster-timeout", "--step-timeout",
    "--tensor-parallel-size", "-tp", "--prefill-context-parallel-size", "-pcp", "--decode-context-parallel-size",
    "-dcp", "--pipeline-parallel-size", "-pp", "--enable-expert-parallel", "--ranks-per-node", "--cost-constants",
    "--page-size", "--kv-cache-memory-bytes", "--pages-per-shard", "--enable-prefix-caching",
    "--no-enable-prefix-caching", "--max-num-batched-tokens", "--max-num-seqs", "--max-model-len", "--local-context",
    "--schedule", "--speculative", "--executor", "--dtype", "--seed", "--num-threads", "--debug", "--json", "--help",
    "--kv-cache-dtype", "--device", "--async-scheduling", "--no-async-scheduling", "--gpu-memory-utilization",
    "--attention-backend", "--cpu-kernels", "--quantization", "-q", "--enforce-eager", "--kv-offload-memory",
    "--kv-offload-disk", "--scheduling-policy", "--tokenizer", "--revision", "--load-format",
    "--cudagraph-capture-sizes", "--disable-custom-all-reduce",
}  # fmt: skip
LISTEN_OPTIONS = {
    "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs", "--log-level", "--disable-uvicorn-access-log",
}  # fmt: skip
OPTIONS = {
    ("generate",): ENGINE_OPTIONS | {
        "--prompt", "--prompt-file", "--prompt-ids", "--chat", "--max-tokens", "--temperature", "--top-p", "--top-k",
        "--min-p", "--stop", "--ignore-eos", "--n", "--trace",
    },
    ("explain",): ENGINE_OPTIONS | {"--new", "--cached", "--hardware"},
    ("plan",): {
        "--concurrency", "--context", "--decode-context-parallel-size", "-dcp", "--dtype", "--enable-expert-parallel",
        "--gpus", "--hardware", "--help", "--json", "--kv-cache-dtype", "--max-num-batched-tokens", "--memory-fraction",
        "--new", "--nodes", "--objective", "--output", "--pipeline-parallel-size", "-pp", "--plot",
        "--prefill-context-parallel-size", "-pcp", "--tensor-parallel-size", "-tp", "--weight-dtype", "--all",
        "--max-ttft", "--max-tpot", "--price",
    },
    ("predict",): {
        "--batch", "--cached-tokens", "--dcp", "--dtype", "--gpus", "--gpus-per-node", "--hardware", "--help", "--id",
        "--json", "--kv-cache-dtype", "--memory-fraction", "--model", "--new-tokens", "--pcp", "--pp", "--quantity",
        "--rows", "--schedule", "--tp", "--unit", "--value", "--weight-dtype", "-tp", "-pcp", "-dcp", "-pp", "--cached",
        "--new", "--max-num-batched-tokens",
    },
    ("simulate",): {
        "--dtype", "--enable-prefix-caching", "--gpus-per-node", "--hardware", "--help", "--instances",
        "--json", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--layout", "--local-context", "--max-input-len",
        "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--memory-fraction",
        "--no-enable-prefix-caching", "--num-requests", "--page-size", "--plot", "--schedule", "--time-scale",
        "--trace", "--weight-dtype",
    },
    ("route",): LISTEN_OPTIONS | {
        "--api-key", "--api-key-file", "--decode", "--help", "--host", "--max-body-bytes", "--port", "--prefill",
        "--transfer-token-file", "--wait",
    },
    ("calibrate",): {"--check", "--executor", "--hardware", "--help", "--json", "--model", "--output"},
    ("bench", "attention"): {
        "--backends", "--batch", "--cached", "--device", "--heads", "--help", "--json", "--kv-cache-dtype", "--prefill",
        "--seconds", "--shards", "--shared-context",
    },
    ("bench", "merge"): {"--backends", "--device", "--heads", "--help", "--json", "--parts", "--seconds", "--tokens"},
    ("bench", "moe"): {"--device", "--help", "--json", "--rows", "--seconds", "--shape", "--weights"},
    ("bench", "kv-write"): {
        "--backends", "--device", "--heads", "--help", "--json", "--kv-cache-dtype", "--rows", "--seconds",
    },
    ("bench", "schedules"): {
        "--new", "--cached", "--layouts", "--executor", "--iterations", "--plot", "--json", "--help",
    },
    ("bench", "mixed"): ENGINE_OPTIONS | {
        "--chats", "--chat-len", "--contexts", "--context-len", "--output-len", "--iterations",
    },
    ("bench", "serve"): {
        "--base-url", "--model", "--api-key", "--endpoint", "--dataset", "--dataset-path", "--num-prompts",
        "--input-len", "--output-len", "--vary", "--prefix-len", "--request-rate", "--concurrency", "--speedup",
        "--max-input-len", "--seed", "--vocab-size", "--text-prompts", "--temperature", "--ignore-eos",
        "--no-ignore-eos", "--timeout", "--plot", "--json", "--help",
    },
    ("serve",): (ENGINE_OPTIONS - {"--json"}) | LISTEN_OPTIONS | {
        "--host", "--port", "--api-key", "--api-key-file", "--served-model-name", "--max-queued-requests",
        "--max-body-bytes", "--request-timeout", "--tool-call-parser", "--role", "--transfer-host", "--transfer-port",
        "--prefill-peers", "--transfer-token-file", "--allowed-origins", "--cache-salt-by-key", "--disable-log-stats",
        "--chat-template", "--trust-request-chat-template", "--generation-config",
    },
    ("bench", "latency"): ENGINE_OPTIONS | {
        "--input-len", "--output-len", "--batch-size", "--iterations", "--warmup", "--compare", "--compare-layout",
    },
    ("bench", "throughput"): ENGINE_OPTIONS | {"--num-prompts", "--input-len", "--output-len"},
    ("bench", "scheduler"): {"--running", "--context", "--shards", "--page-size", "--steps", "--json", "--help"},
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("generate", MODEL, ...)` gives (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code), out, err

    return call


@pytest.fixture
def generate(run):
    """`generate(...)` on a tiny model without a tokenizer."""
    sizes = ("--page-size", "4", "--dtype", "float32")
    return lambda *arguments: run("generate", tiny_folder("llama"), *sizes, *arguments)


@pytest.mark.parametrize("command", OPTIONS, ids=" ".join)
def test_the_options_of_a_command_are_those_listed(command):
    found = typer.main.get_command(build_app())
    for name in command:
        found = found.commands[name]
    with found.make_context("longspan", [], resilient_parsing=True) as context:
        text = found.get_help(context)
    names = re.findall(r"^  (?:\S.*?)(?=  |$)", text, re.MULTILINE)
    given = {option for name in names for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", name)}
    assert given == OPTIONS[command]


def test_json_prints_one_object_with_exactly_the_documented_keys(generate):
    code, out, err = generate("--prompt-ids", IDS, "--max-tokens", "6", "-pcp", "2", "--local-context", "8", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["token_ids"] == greedy(oracle("llama"), prompt_of(33), 6)[0]
    assert set(report) == {
        "text", "token_ids", "prompt_tokens", "finish_reason", "kv", "schedule", "timing", "comm",
    }  # fmt: skip
    assert set(report["kv"]) == {"page_size", "capacity_tokens", "pages_per_shard", "used_pages_per_shard"}
    assert set(report["schedule"]) == {"prefill", "decode"}
    assert set(report["timing"]) == {"ttft_s", "decode_tokens_per_s"}
    assert set(report["comm"]) == {"bytes", "calls", "by_label"}
    assert report["kv"]["capacity_tokens"] == sum(report["kv"]["pages_per_shard"]) * report["kv"]["page_size"]
    assert report["comm"]["bytes"] > 0
    assert "KV cache size" in err


def test_a_small_max_num_batched_tokens_alone_is_accepted(generate):
    code, _, err = generate("--prompt-ids", "1,2", "--max-tokens", "1", "--max-num-batched-tokens", "193")
    assert code == 0, err


def test_the_kv_cache_line_reports_pages_times_page_size(generate):
    _, _, err = generate("--prompt-ids", "1,2", "--max-tokens", "1", "-pcp", "2", "--pages-per-shard", "40,24")
    line = " ".join(err.split())
    assert "KV cache size: 256 tokens (pages of 4: 40 + 24)" in line
    assert "maximum concurrency for 512 tokens per request: 0.50x" in line


def test_explain_shows_every_schedule_and_the_choice(run):
    code, out, _ = run("explain", tiny_folder("gpt-oss"), "-pcp", "4", "--new", "64", "--cached", "400",
                       "--hardware", "h100")  # fmt: skip
    assert code == 0
    assert "window of 11" in out
    for schedule in TRAVELLING:
        assert schedule in out
    assert out.count(" * ") == 1
    assert "window of 11: nothing travels" in out  # and so there is nothing to choose


def test_explain_has_a_legend_and_no_negative_zero(run):
    _, out, _ = run("explain", tiny_folder("llama"), "-pcp", "4", "--new", "64", "--hardware", "h100")
    assert "-0.00" not in out
    for term in ("fixed: ", "transfer: ", "copies: ", "hidden: "):
        assert term in " ".join(out.split())


def test_explain_without_a_table_has_no_legend(run):
    _, out, _ = run("explain", tiny_folder("llama"), "--hardware", "h100")
    assert "nothing travels" in out and "chosen" not in out


def test_no_link_rate_is_shown_for_ranks_that_share_memory():
    line = constants_line(CostConstants(byte_s=0.0, cross_byte_s=1e-9))
    assert "; ranks share memory, collective" in line
    assert "between machines link 1.0 GB/s" in line


@pytest.mark.parametrize(("flop_s", "rate"), [(1e-12 / 989, "989.0 TFLOP/s"), (1e-9 / 24, "24.0 GFLOP/s")])
def test_rates_are_shown_in_a_unit_of_their_size(flop_s, rate):
    assert constants_line(CostConstants(flop_s=flop_s)).startswith(f"cost model: attention {rate}, ")


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"longspan {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [("serve", "./no-such-model"), ("route", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2")],
    ids=["serve", "route"],
)
def test_a_busy_port_is_reported_before_a_model_is_loaded_or_instances_are_awaited(run, command):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        code, out, err = run(*command, "--port", str(port))
    assert (code, out) == (2, "")
    remedy = "end what listens there, or give another --port; 0 takes a free one"
    assert err.splitlines()[-1] == f"longspan: error: port={port}: is in use on 127.0.0.1; {remedy}"


@pytest.mark.parametrize(
    ("host", "message"), [("8.8.8.8", "host=8.8.8.8: is no address of this machine"), ("no.such.", "host=no.such.: ca")]
)
def test_a_host_that_is_not_of_this_machine_is_refused(run, host, message):
    code, _, err = run("serve", "./no-such-model", "--host", host, "--api-key", "k")
    assert code == 2
    assert message in err


def test_explain_for_named_hardware_accepts_more_ranks_than_gpus(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    code, out, _ = run("explain", tiny_folder("llama"), "-pcp", "4", "--hardware", "h100")
    assert code == 0
    assert "gather_kv" in out


def test_constants_printed_by_explain_are_accepted_as_cost_constants(run, generate, tmp_path):
    code, out, _ = run("explain", tiny_folder("llama"), "-pcp", "2", "--new", "8", "--cached", "64", "--json")
    report = json.loads(out)
    assert code == 0
    assert {s["schedule"] for s in report["kinds"][0]["schedules"]} == {*TRAVELLING, *IN_PLACE}
    (tmp_path / "cost.json").write_text(json.dumps(report["constants"]))
    code, out, err = generate("--prompt-ids", IDS, "--max-tokens", "2", "-pcp", "2", "--local-context", "8",
                              "--cost-constants", str(tmp_path / "cost.json"))  # fmt: skip
    assert code == 0
    assert "cost model" not in err  # nothing was measured


def test_the_measured_constants_are_printed(generate):
    _, _, err = generate("--prompt-ids", IDS, "--max-tokens", "2", "-pcp", "2")
    assert re.search(r"cost model: attention .* GFLOP/s, keys read at .* GB/s, merged at", " ".join(err.split()))


@pytest.mark.parametrize("executor", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_trace_has_compute_and_transfers_of_every_rank(generate, tmp_path, executor):
    file = tmp_path / "trace.json"
    code, out, err = generate("--prompt-ids", IDS, "--max-tokens", "3", "-pcp", "2", "--local-context", "8",
                              "--schedule", "ring_kv", "--executor", executor, "--trace", str(file))  # fmt: skip
    assert (code, out.split()) == (0, [str(token) for token in greedy(oracle("llama"), prompt_of(33), 3)[0]])
    assert "s overlap" in " ".join(err.split())
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {(event["pid"], event["cat"]) for event in events} >= {
        (rank, lane) for rank in (0, 1) for lane in ("step", "compute", "transfer")
    }
    assert all(event["dur"] >= 0 for event in events)


def test_mixed_compares_three_placements(run):
    code, out, _ = run(
        "bench", "mixed", tiny_folder("llama"), "-pcp", "2", "--chats", "4", "--chat-len", "8", "--contexts", "1",
        "--context-len", "100", "--output-len", "4", "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["placement"] for row in rows] == ["by length", "all spread", "all local"]
    assert all(row["output_tokens_per_s"] > 0 and row["chat_ms_between_tokens"] > 0 for row in rows)


@pytest.mark.parametrize(("dcp", "noted"), [("1", True), ("4", False)])
def test_copies_of_the_kv_cache_are_noted_with_the_remedy(run, dcp, noted):
    model = tiny_folder("deepseek-v3")
    _, _, err = run("generate", model, "--prompt-ids", "1,2", "--max-tokens", "1", "-tp", "4", "-dcp", dcp)
    expected = "tensor_parallel_size=4 keeps 4 copies of the KV cache (the model has 1 KV heads); --decode-context-"
    assert (expected in " ".join(err.split())) == noted


def test_token_ids_are_printed_without_a_tokenizer(generate):
    code, out, _ = generate("--prompt-ids", IDS, "--max-tokens", "3")
    assert (code, out.split()) == (0, [str(token) for token in greedy(oracle("llama"), prompt_of(33), 3)[0]])


def test_all_n_completions_are_in_the_json(generate):
    code, out, _ = generate("--prompt-ids", IDS, "--max-tokens", "3", "--n", "2", "--temperature", "1", "--json")
    assert code == 0
    assert [len(completion["token_ids"]) for completion in json.loads(out)["completions"]] == [3, 3]


MISTAKES = {
    "a local context no shard can hold": (
        ["--prompt-ids", "1", "--pages-per-shard", "10,4", "-pcp", "2", "--local-context", "50"],
        r"local_context=50: exceeds the 40 tokens the largest shard holds; use at most 40",
    ),
    "a file of constants that does not exist": (
        ["--prompt-ids", "1", "--cost-constants", "/nowhere"], r"cost_constants=/nowhere: cannot be read .*; give what"
    ),
    "a trace that cannot be written": (
        ["--prompt-ids", "1", "--trace", "/nowhere/trace"], r"trace=/nowhere/trace: cannot be written"
    ),
    "tp that does not divide the heads": (
        ["-tp", "5", "--prompt-ids", "1"], r"tensor_parallel_size=5: must divide the model's 24 query heads; use one of"
    ),
    "dcp that does not divide tp": (
        ["-tp", "2", "-dcp", "3", "--prompt-ids", "1"],
        r"decode_context_parallel_size=3: must divide tensor_parallel_size=2.*use one of 1, 2",
    ),
    "zero ranks": (["-pcp", "0", "--prompt-ids", "1"], r"prefill_context_parallel_size=0: must be at least 1; use 1"),
    "a prompt that can never fit": (
        ["--prompt-ids", IDS, "--pages-per-shard", "3"], r"33 prompt tokens .* exceed the 13 tokens .*; shorten"
    ),
    "a negative number": (["--prompt-ids", "1", "--max-tokens", "-3"], r"max_tokens=-3: must not be negative"),
    "a negative page size": (["--prompt-ids", "1", "--page-size", "-1"], r"page_size=-1: must be at least 1; 16 is"),
    "a value that is not a number": (
        ["--prompt-ids", "1", "--max-tokens", "x"], r"'--max-tokens'.*'x'"
    ),
    "a malformed list of token ids": (
        ["--prompt-ids", "1,b"], r"prompt_ids=1,b: is not a list of integers; write them as 1,2,3"
    ),
    "an empty prompt": (["--prompt", ""], r"prompt='': from --prompt is empty; give at least one character"),
    "no prompt": ([], r"prompt=0 given: .*give one of --prompt, --prompt-file, --prompt-ids"),
    "two prompts": (["--prompt", "a", "--prompt-ids", "1"], r"prompt=2 given"),
    "no such prompt file": (["--prompt-file", "./no"], r"prompt_file=./no: cannot be read \(No such file"),
    "text without a tokenizer": (["--prompt", "hello"], r"prompt='hello': is text and this model has no tokenizer"),
    "an unknown schedule": (["--prompt-ids", "1", "--schedule", "pigeon"], r"schedule=pigeon: unknown choice"),
    "local with dcp": (["-tp", "2", "-dcp", "2", "--schedule", "local", "--prompt-ids", "1"], r"schedule=local: "),
    "too long a context": (["--prompt-ids", "1", "--max-model-len", "9999"], r"max_model_len=9999: exceeds the 512"),
    "pages for the wrong shards": (["--prompt-ids", "1", "--pages-per-shard", "1,2"], r"pages_per_shard=\(1, 2\): na"),
    "a malformed size": (
        ["--prompt-ids", "1", "--kv-cache-memory-bytes", "12Q"], r"kv_cache_memory_bytes=12Q: is not a size"
    ),
    "too little memory": (["--prompt-ids", "1", "--kv-cache-memory-bytes", "1"], r"kv_cache_memory_bytes=1: one page"),
    "a malformed size of offload memory": (
        ["--prompt-ids", "1", "--kv-offload-memory", "much"], r"kv_offload_memory=much: is not a size"
    ),
    "a malformed size of an offload disk": (
        ["--prompt-ids", "1", "--kv-offload-disk", "/tmp:9x"], r"kv_offload_disk=9x: is not a size"
    ),
    "an offload folder that does not exist": (
        ["--prompt-ids", "1", "--kv-offload-disk", "/nowhere"], r"kv_offload_disk=/nowhere: cannot be written"
    ),
    "an unknown option": (["--prompt-ids", "1", "--nope"], r"--nope"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_message_and_exit_code_2(generate, mistake):
    arguments, message = MISTAKES[mistake]
    code, out, err = generate(*arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("longspan: error: ")]
    assert (code, out) == (2, "")
    assert re.search(message, line), line
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["bench", "latency", "x", "--input-len", "0"]])
def test_an_invalid_command_line_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("longspan: error: ")


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_without_arguments_the_help_is_shown_in_lines(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert len(err.splitlines()) > 5


@pytest.mark.parametrize("name", ["./nothing", "no.gguf", "nothing"])
def test_a_missing_model_is_named(run, name):
    code, _, err = run("generate", name, "--prompt", "x")
    assert code == 2
    assert f"model={name}: no such folder or file; give a folder with config.json" in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"architectures": ["StrangeForCausalLM"]}', "architectures=['StrangeForCausalLM'] in config.json is not su"),
        ('{"model_type": "strange"}', "config.json names no architectures, and model_type=strange is not supported"),
        ("{}", "config.json names no architectures, and model_type=None is not supported; supported are Llama"),
    ],
)
def test_an_unknown_architecture_is_reported_even_without_weights(run, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    code, _, err = run("generate", str(tmp_path), "--prompt-ids", "1")
    assert code == 2
    assert message in err


def test_a_config_without_architectures_is_read_by_its_model_type():
    for name in builtin_names():
        values = builtin_config(name)
        assert load_config({**values, "architectures": None}) == load_config(values), name


def test_a_dry_run_accepts_a_built_in_model(run):
    code, out, err = run("generate", "qwen3-235b", "--prompt-ids", "1,2,3", "--max-tokens", "3", "--executor", "dry")
    assert code == 0, err
    assert len(out.split()) == 3


def test_explain_accepts_a_built_in_model_with_any_layout(run):
    code, out, err = run("explain", "llama-3-405b", "-tp", "8", "-pcp", "4", "--hardware", "h200")
    assert code == 0, err
    assert "ring_kv" in out


def test_the_scheduler_benchmark_reports_every_context(run):
    code, out, _ = run("bench", "scheduler", "--running", "4", "--context", "64,512", "--steps", "3", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["context"] for row in rows] == [64, 512]
    assert all(row["total_us"] > 0 for row in rows)


def test_the_throughput_benchmark_counts_every_token(run):
    code, out, _ = run(
        "bench", "throughput", tiny_folder("llama"), "--num-prompts", "5", "--input-len", "20", "--output-len", "4",
        "-pcp", "2", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report["requests"] == 5
    assert report["output_tokens"] >= 5


def test_the_latency_benchmark_tells_of_drafts_only_where_something_was_drafted(capsys):
    runs = [
        ContestantTiming(1, 1, 9, DraftCounts.of_step(2, 2)),
        ContestantTiming(1, 1, 9, DraftCounts.of_step(2, 1)),
        ContestantTiming(1, 1, 9, DraftCounts.of_step(1, 0)),
    ]
    report = {"drafting": _rates(10, runs), "plain": _rates(10, [ContestantTiming(1, 1, 9)])}
    assert report["drafting"]["speculation"] == {"mean_acceptance_length": 2, "acceptance_by_position": [2 / 3, 1 / 2]}
    _show_rates(Console(stderr=True), report, 1)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last == "drafting: 2.00 tokens a step with drafts; accepted by position: 67%, 50%"


@pytest.mark.slow
def test_the_latency_benchmark_compares_layouts_and_transformers_in_turn_and_shows_its_progress_without_warnings():
    command = [
        sys.executable, "-c", "from longspan.cli.main import main; main()", "bench", "latency", tiny_folder("llama"),
        "--input-len", "40", "--output-len", "4", "--iterations", "2", "--warmup", "0",
        "--compare", "transformers", "--compare-layout", "pcp=2", "--json",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = json.loads(ended.stdout)["ratio"]
    assert set(ratios) == {"pcp=2", "transformers"}
    assert all(ratio["prefill"] > 0 and ratio["decode"] > 0 for ratio in ratios.values())
    assert [line for line in ended.stderr.splitlines() if "longspan" in line][:3] == [
        "loading longspan", "longspan: run 1 of 2", "longspan: run 2 of 2",
    ]  # fmt: skip
    assert "Warning" not in ended.stderr  # of libraries


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_worker_ends_the_command_with_an_error(tmp_path):
    command = [
        sys.executable, "-c", "from longspan.cli.main import main; main()", "generate", tiny_folder("llama"),
        "--prompt-ids", "1,2,3", "--max-tokens", "400", "--executor", "processes", "-pcp", "2",
    ]  # fmt: skip
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver.stdout.read(1)  # waits for the first token: then all ranks are running
    workers = children(driver.pid)
    os.kill(workers[-1], 9)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 2
    assert re.search(r"longspan: error: rank \d \(process \d+\) ended with exit code -9", err)
    assert not [process for process in workers if Path(f"/proc/{process}").exists()]


def test_a_signal_ends_a_server_that_is_starting_without_a_traceback():
    command = [sys.executable, "-c", "from longspan.cli.main import main; main()", "serve", tiny_folder("llama")]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        while not children(process.pid):  # the core is there then, and not ready yet
            time.sleep(0.01)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "longspan: interrupted\n")


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == reference(), "run: python -m longspan.cli.reference > docs/cli.md"


def test_an_empty_text_is_not_printed_as_token_ids(capsys):
    printer = _Printer(has_text=True)
    for text, ids in (("", [12345]), ("", [12345, 678]), (" Paris is", [12345, 678, 9])):
        printer.show(RequestOutput("r", None, [], [CompletionOutput(0, text, ids)]))
    assert capsys.readouterr().out == " Paris is"


@pytest.mark.parametrize("model", ["qwen3-moe", "deepseek-v2-lite", "deepseek-v3"])
def test_transformers_gives_the_same_tokens_on_the_same_weights(model):
    model_of_transformers = transformers_reference(resolve_model(tiny_folder(model)), torch.float32)
    assert greedy(model_of_transformers, prompt_of(9), 3)[0] == greedy(oracle(model), prompt_of(9), 3)[0]


def test_the_scheduler_benchmark_refuses_a_page_size_of_0(run):
    code, _, err = run("bench", "scheduler", "--page-size", "0")
    assert (code, "page_size=0: must be at least 1" in err) == (2, True)
