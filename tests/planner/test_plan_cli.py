"""`longspan plan` and `longspan predict` as a user meets them."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from longspan.cli.plan import plan
from longspan.cli.predict import predict
from longspan.errors import ConfigError

PUBLISHED = str(Path(__file__).parent / "published.csv")
LLAMA = ["plan", "llama-3-70b", "--hardware", "h200", "--context", "32768"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command("plan")(plan)
    made.command("predict")(predict)
    return made


def run(app: typer.Typer, *arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_has_times_bounds_and_the_command_of_every_layout(app):
    rows = run(app, *LLAMA)["layouts"]
    best = rows[0]
    assert best["fits"]
    assert best["ttft"]["seconds"] == min(row["ttft"]["seconds"] for row in rows if row["fits"])
    assert best["ttft"]["bound"] == "compute"
    assert best["tpot"]["exposed"] >= 0
    assert best["command"].startswith("longspan serve llama-3-70b")
    spread = next(row for row in rows if row["dcp"] == 4 and row["pp"] == row["pcp"] == 1)
    assert "-tp 8 -dcp 4" in spread["command"]


def test_weights_of_half_the_size_leave_room_for_more_tokens(app):
    plain, half = (
        run(app, *LLAMA, "-tp", "8", "-dcp", "1", "--weight-dtype", name)["layouts"][0] for name in ("bf16", "fp8")
    )
    assert half["capacity_tokens"] > plain["capacity_tokens"]
    assert half["tpot"]["seconds"] < plain["tpot"]["seconds"]


def test_more_machines_make_a_tp_group_slower(app):
    near, far = (run(app, *LLAMA, "-tp", "8", "-dcp", "1", "--nodes", nodes)["layouts"][0] for nodes in ("1", "4"))
    assert far["ttft"]["exposed"] > 2 * near["ttft"]["exposed"]


def test_a_plan_draws_its_best_layouts(app, tmp_path):
    pytest.importorskip("matplotlib")
    run(app, *LLAMA, "--plot", str(tmp_path / "plan.svg"))
    texts = {text.text for text in ElementTree.parse(tmp_path / "plan.svg").getroot().iterfind(".//{*}text")}
    assert "tokens of context" in texts
    assert len([text for text in texts if "tp" in text]) == 4


def test_without_json_the_table_ends_with_the_command_to_start(app):
    result = CliRunner().invoke(app, [*LLAMA, "-tp", "8", "-dcp", "2"], catch_exceptions=False)
    assert "longspan serve llama-3-70b -tp 8 -dcp 2" in result.stderr
    assert "131,072" not in result.stderr


def test_a_context_beyond_the_models_positions_is_told(app):
    result = CliRunner().invoke(app, ["plan", "qwen3-8b", "--hardware", "h200"], catch_exceptions=False)
    assert "made for 40,960 positions" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "0"], "gpus=0"), (["--nodes", "3"], "nodes=3"), (["--objective", "fast"], "objective=fast"),
        (["--weight-dtype", "fp5"], "weight_dtype=fp5"), (["--kv-cache-dtype", "int4"], "kv_cache_dtype=int4"),
        (["--memory-fraction", "2"], "memory_fraction=2"), (["--enable-expert-parallel"], "has no experts"),
        (["--concurrency", "0"], "concurrency=0"), (["--plot", "/nowhere/x.svg"], "plot=/nowhere/x.svg"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_option_and_the_value(app, more, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [*LLAMA, *more], catch_exceptions=False)


def test_a_file_of_rows_gives_each_its_prediction_and_error(app):
    rows = run(app, "predict", "--rows", PUBLISHED)["rows"]
    assert set(rows[0]) == {"id", "quantity", "unit", "predicted", "value", "error"}
    assert {(row["quantity"], row["unit"]) for row in rows} == {("ttft", "ms"), ("ttit", "ms"), ("kv_tokens", "tokens")}
    assert len(rows) == 33


def test_one_row_is_given_as_options(app):
    options = ["--model", "llama-3-405b", "--hardware", "h100-meta", "--tp", "8", "--new_tokens", "8192"]
    (row,) = run(app, "predict", *options, "--value", "1740", "--unit", "ms")["rows"]
    assert abs(row["error"]) < 0.05
    assert row["error"] == pytest.approx(row["predicted"] / 1740 - 1)


def test_a_prediction_is_shown_with_its_setup_quantity_and_unit(app):
    options = ["--model", "llama-3-70b", "--hardware", "h200", "--pp", "8", "--new-tokens", "131072", "--unit", "s"]
    result = CliRunner().invoke(app, ["predict", *options], catch_exceptions=False)
    assert "llama-3-70b on 8 x h200, tp=1,pcp=1,dcp=1,pp=8: 1 x 131,072 new tokens" in result.stderr
    assert re.search(r"time to first token +\d\.\d\d +s", result.stderr)
    assert not result.stdout


@pytest.mark.parametrize(("tp", "pp"), [("1", "8"), ("2", "4")])
def test_a_plan_and_a_prediction_of_a_pipeline_are_the_same(app, tp, pp):
    (planned,) = run(app, *LLAMA, "-tp", tp, "-pcp", "1", "-dcp", "1", "-pp", pp, "--output", "2")["layouts"]
    setup = ["predict", "--model", "llama-3-70b", "--hardware", "h200", "--tp", tp, "--pp", pp, "--unit", "s"]
    (first,) = run(app, *setup, "--new-tokens", "32768")["rows"]
    (each,) = run(app, *setup, "--quantity", "ttit", "--new-tokens", "1", "--cached-tokens", "32768")["rows"]
    assert first["predicted"] == pytest.approx(planned["ttft"]["seconds"])
    assert each["predicted"] == pytest.approx(planned["tpot"]["seconds"])


def test_a_row_without_a_model_is_refused(app):
    with pytest.raises(ConfigError, match="model=: is missing"):
        CliRunner().invoke(app, ["predict", "--hardware", "h100"], catch_exceptions=False)
