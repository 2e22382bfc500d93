"""The commands `longspan plan` and `longspan predict`: options, tables, JSON and errors."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from longspan.cli.options import takes_records
from longspan.cli.plan import plan
from longspan.cli.predict import predict
from longspan.config import EngineConfig
from longspan.engine.setup import EngineSetup, resolve
from longspan.errors import ConfigError
from longspan.planner.models import find_config
from longspan.server.options import ServeOptions
from longspan.weights.builtin import builtin_names, hub_id

PUBLISHED = str(Path(__file__).parent / "published.csv")
LLAMA = ["plan", "llama-3-70b", "--hardware", "h200", "--context", "32768"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command("plan")(takes_records(plan))
    made.command("predict")(predict)
    return made


def run(app: typer.Typer, *arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_has_times_and_bounds_of_every_layout_ordered_by_the_objective(app):
    rows = run(app, *LLAMA, "--objective", "ttft")["layouts"]
    best = rows[0]
    assert best["fits"]
    assert best["ttft"]["seconds"] == min(row["ttft"]["seconds"] for row in rows if row["fits"])
    assert best["ttft"]["bound"] == "compute"
    assert best["tpot"]["exposed"] >= 0
    assert next(row for row in rows if row["dcp"] == 4 and row["pp"] == row["pcp"] == 1)["name"] == "tp8 dcp4"


def test_the_default_order_is_the_time_of_a_whole_request(app):
    rows = [row for row in run(app, *LLAMA, "--output", "256")["layouts"] if row["fits"]]
    whole = [row["ttft"]["seconds"] + 255 * row["tpot"]["seconds"] for row in rows]
    assert whole == sorted(whole)


def started(command: str, *more: str) -> EngineSetup:
    """The engine's setup for a printed command, on a machine without the weights and devices."""
    found: list[EngineConfig] = []

    def serve(config: EngineConfig, options: ServeOptions) -> None:
        found.append(config)

    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(takes_records(serve))
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("longspan", "serve")
    result = CliRunner().invoke(made, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return resolve(found[0])


PLANNED = {
    **{f"{name} as it is": ["plan", name, "--gpus", "16"] for name in builtin_names()[::3]},
    "one device": ["plan", "qwen3-8b", "--gpus", "1", "--context", "20000"],
    "FP8 weights dequantised": ["plan", "qwen3-235b-a22b-fp8", "--weight-dtype", "bf16"],
    "4-bit weights kept": ["plan", "gpt-oss"],
    "4-bit weights dequantised": ["plan", "gpt-oss", "--weight-dtype", "bf16"],
    "an FP8 cache": [*LLAMA, "--kv-cache-dtype", "fp8"],
    "experts in parallel": ["plan", "qwen3-235b", "--enable-expert-parallel"],
    "four machines, fp16": [*LLAMA, "--gpus", "16", "--nodes", "4", "--dtype", "fp16"],
    "a small max_num_batched_tokens": [*LLAMA, "--max-num-batched-tokens", "128"],
}
# models whose weights on the hub cannot be served
NOT_SERVED = {"kimi-k2-thinking", "llama-3-405b", "qwq-32b-fp8"}


@pytest.mark.parametrize("case", PLANNED)
def test_every_printed_command_starts_what_was_planned(app, case):
    found = run(app, *PLANNED[case], "--hardware", "h200")
    rows = [row for row in found["layouts"] if row["fits"]]
    if case.removesuffix(" as it is") in NOT_SERVED:
        assert found["no_command"] and not any(row["command"] for row in rows)
        return
    assert found["no_command"] is None and rows
    for row in rows:
        assert row["command"].startswith(f"longspan serve {hub_id(find_config(found['model']))} ")
        setup = started(row["command"], "--executor", "dry")
        assert setup.config.parallel.short_name == row["name"]
        assert setup.config.parallel.enable_expert_parallel == ("--enable-expert-parallel" in PLANNED[case])
        assert setup.capacity_tokens == pytest.approx(row["capacity_tokens"], rel=0.01)
        assert setup.max_model_len == min(found["context"] + 256, setup.model.max_position_embeddings)
        spread = row["tp"] * row["pcp"] * row["pp"] > 1
        assert bool(re.search("--executor (processes|ray)", row["command"])) == spread


def test_the_command_for_several_machines_uses_ray(app):
    result = CliRunner().invoke(app, [*LLAMA, "--gpus", "16"], catch_exceptions=False)
    assert "--executor ray --ray-address" in result.stderr
    assert "the head of a Ray cluster of 2 machines" in result.stderr


def test_only_the_pareto_set_is_shown_without_all(app):
    rows = run(app, *LLAMA)["layouts"]
    best = [row for row in rows if row["pareto"]]
    beaten = next(row for row in rows if row["fits"] and not row["pareto"])
    assert any(
        other["ttft"]["seconds"] <= beaten["ttft"]["seconds"] and other["tpot"]["seconds"] <= beaten["tpot"]["seconds"]
        for other in best
    )
    shown, every = (CliRunner().invoke(app, [*LLAMA, *more], catch_exceptions=False).stderr for more in ([], ["--all"]))
    assert re.findall(r"^  (\S.*?)  +[\d,]+  ", shown, re.MULTILINE) == [row["name"] for row in best]
    hidden = [sum(row["fits"] and not row["pareto"] for row in rows), sum(not row["fits"] for row in rows)]
    told = f"{hidden[0]} not in the Pareto set, {hidden[1]} too large for the devices; --all shows them"
    assert f"hidden layouts: {told}" in shown
    assert "lacks" in every and f"{best[0]['name']} *" in every and f"{beaten['name']} *" not in every


def test_only_layouts_within_the_limits_are_kept(app):
    rows = run(app, *LLAMA, "--objective", "ttft")["layouts"]
    limit = sorted(row["tpot"]["seconds"] for row in rows if row["fits"])[3] * 1e3
    kept = run(app, *LLAMA, "--objective", "ttft", "--max-tpot", str(limit))["layouts"]
    assert {row["name"] for row in kept if row["within_limits"]} == {
        row["name"] for row in rows if row["fits"] and row["tpot"]["seconds"] * 1e3 <= limit
    }


@pytest.mark.parametrize(("flag", "limit"), [("--max-ttft", "0.001 s"), ("--max-tpot", "0.5 ms")])
def test_a_limit_that_no_layout_meets_is_refused_in_the_unit_of_its_flag(app, flag, limit):
    value, unit = limit.split()
    with pytest.raises(ConfigError, match=rf"={limit}: no layout is that fast: tp.* takes [\d.]+ {unit}; raise"):
        CliRunner().invoke(app, [*LLAMA, flag, value], catch_exceptions=False)


def test_with_a_price_the_price_of_a_million_tokens_is_shown(app):
    row = run(app, *LLAMA, "--price", "3.6")["layouts"][0]
    assert row["price_per_million"] == pytest.approx(1e3 / row["throughput_per_gpu"])
    assert run(app, *LLAMA)["layouts"][0]["price_per_million"] is None
    assert "price of" in CliRunner().invoke(app, [*LLAMA, "--price", "3.6"], catch_exceptions=False).stderr


def test_weights_of_half_the_size_allow_more_tokens_and_faster_decode(app):
    plain, half = (
        run(app, *LLAMA, "-tp", "8", "-dcp", "1", "--weight-dtype", name)["layouts"][0] for name in ("bf16", "fp8")
    )
    assert half["capacity_tokens"] > plain["capacity_tokens"]
    assert half["tpot"]["seconds"] < plain["tpot"]["seconds"]


def test_a_tp_group_over_more_machines_waits_longer_for_transfers(app):
    near, far = (run(app, *LLAMA, "-tp", "8", "-dcp", "1", "--nodes", nodes)["layouts"][0] for nodes in ("1", "4"))
    assert far["ttft"]["exposed"] > 2 * near["ttft"]["exposed"]


def test_the_plot_of_a_plan_labels_the_pareto_set(app, tmp_path):
    pytest.importorskip("matplotlib")
    rows = run(app, *LLAMA, "--plot", str(tmp_path / "plan.svg"))["layouts"]
    texts = {text.text for text in ElementTree.parse(tmp_path / "plan.svg").getroot().iterfind(".//{*}text")}
    assert {"time to first token, s", *(row["name"] for row in rows if row["pareto"])} <= texts


def test_the_command_that_starts_the_best_layout_follows_the_table(app):
    result = CliRunner().invoke(app, [*LLAMA, "-tp", "8", "-dcp", "2"], catch_exceptions=False)
    assert result.stderr.splitlines()[-1].startswith("longspan serve meta-llama/Llama-3.1-70B-Instruct -tp 8 -dcp 2 ")


def test_a_context_beyond_the_models_positions_is_noted(app):
    result = CliRunner().invoke(app, ["plan", "qwen3-8b", "--hardware", "h200"], catch_exceptions=False)
    assert "the model has 40,960 positions" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "0"], "gpus=0"), (["--nodes", "3"], "nodes=3"), (["--objective", "fast"], "objective=fast"),
        (["--weight-dtype", "fp5"], "weight_dtype=fp5"), (["--kv-cache-dtype", "int4"], "kv_cache_dtype=int4"),
        (["--memory-fraction", "2"], "memory_fraction=2"), (["--max-tpot", "0"], "max_tpot=0"),
        (["--enable-expert-parallel"], "has no experts"),
        (["--concurrency", "0"], "concurrency=0"), (["--plot", "/nowhere/x.svg"], "plot=/nowhere/x.svg"),
    ],
)  # fmt: skip
def test_an_invalid_option_is_refused_with_its_name_and_value(app, more, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [*LLAMA, *more], catch_exceptions=False)


def test_every_row_of_a_file_has_a_prediction_and_an_error(app):
    rows = run(app, "predict", "--rows", PUBLISHED)["rows"]
    assert set(rows[0]) == {"id", "quantity", "unit", "predicted", "value", "error", "chunk_tokens"}
    assert {(row["quantity"], row["unit"]) for row in rows} == {("ttft", "ms"), ("ttit", "ms"), ("kv_tokens", "tokens")}
    assert len(rows) == 33
    shown = CliRunner().invoke(app, ["predict", "--rows", PUBLISHED], catch_exceptions=False).stderr
    assert re.search("id +quantity +predicted +measured +unit +error", shown)


def test_a_setup_can_be_given_as_options(app):
    options = ["--model", "llama-3-405b", "--hardware", "h100-meta", "--tp", "8", "--new_tokens", "8192"]
    (row,) = run(app, "predict", *options, "--value", "1740", "--unit", "ms")["rows"]
    assert abs(row["error"]) < 0.05
    assert row["error"] == pytest.approx(row["predicted"] / 1740 - 1)


def test_a_prediction_is_shown_with_setup_quantity_and_unit(app):
    options = ["--model", "llama-3-70b", "--hardware", "h200", "--pp", "8", "--new-tokens", "131072", "--unit", "s"]
    result = CliRunner().invoke(app, ["predict", *options], catch_exceptions=False)
    assert "llama-3-70b on 8 x h200, tp=1,pcp=1,dcp=1,pp=8: 1 x 131,072 new tokens" in result.stderr
    assert re.search(r"time to first token +\d\.\d\d +s", result.stderr)
    assert "measured" not in result.stderr and "error" not in result.stderr
    assert not result.stdout


def test_a_prediction_through_pipeline_stages_states_the_chunk_it_assumes(app):
    setup = ["predict", "--model", "llama-3-70b", "--hardware", "h200", "--new-tokens", "131072"]
    staged, whole = (CliRunner().invoke(app, [*setup, *more], catch_exceptions=False) for more in (["--pp", "8"], []))
    assert "assumed: chunks of 1,024 tokens" in staged.stderr
    assert "assumed" not in whole.stderr


@pytest.mark.parametrize(("tp", "pp"), [("1", "8"), ("2", "4")])
def test_plan_and_predict_agree_on_a_pipeline(app, tp, pp):
    (planned,) = run(app, *LLAMA, "-tp", tp, "-pcp", "1", "-dcp", "1", "-pp", pp, "--output", "2")["layouts"]
    setup = ["predict", "--model", "llama-3-70b", "--hardware", "h200", "--tp", tp, "--pp", pp, "--unit", "s"]
    (first,) = run(app, *setup, "--new-tokens", "32768")["rows"]
    (each,) = run(app, *setup, "--quantity", "ttit", "--new-tokens", "1", "--cached-tokens", "32768")["rows"]
    assert first["predicted"] == pytest.approx(planned["ttft"]["seconds"])
    assert each["predicted"] == pytest.approx(planned["tpot"]["seconds"])


def test_a_setup_without_a_model_is_refused(app):
    with pytest.raises(ConfigError, match="model: is missing"):
        CliRunner().invoke(app, ["predict", "--hardware", "h100"], catch_exceptions=False)
