"""Calibration of this machine, and the comparison of predictions with the engine."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import torch

from longspan.bench.serving.client import Finished, Outcome
from longspan.bench.serving.report import summarise
from longspan.cli.calibrate import calibrate as command
from longspan.config import CacheConfig, EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
from longspan.models.registry import load_config
from longspan.planner import calibrate as measuring
from longspan.planner import measured_engine, measured_layers
from longspan.planner.hardware import Hardware, hardware_from_yaml
from longspan.planner.models import find_config
from longspan.planner.simulate import check
from longspan.planner.simulate.trace_requests import TraceRequest
from longspan.planner.timing import Bench, typical
from tests.oracle import tiny_folder


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The folder of a tiny model without weights, which is measured quickly."""
    values = {
        **find_config("smollm2-135m"), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes = {
        measuring: {"_STREAM_BYTES": 1 << 20},
        measured_layers: {"_FEW_ROWS": (1, 4), "_MANY_ROWS": (64,), "_PASSED_ROWS": 64, "_SHARED_ROWS": (1, 64)},
        measured_engine: {
            "_CHUNK": 256, "_BRIEF": 16, "_SHORT": 16, "_LONG": 512, "_STEPS": 4, "_MANY": 2, "_CACHE_BYTES": 1 << 22,
        },
    }  # fmt: skip
    for module, changed in sizes.items():
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
    return tmp_path


@pytest.fixture
def machine():
    return Hardware(0.1, 16, 0.02, 10, 10, parallelism=1.0, product_s=((1, 1e-9), (64, 4e-9)))


def test_a_calibration_is_written_as_hardware_that_the_planner_reads(quick, capsys):
    file = quick / "here.yaml"
    command(output=str(file), model=str(quick))
    found = hardware_from_yaml(file)
    assert [rows for rows, _ in found.product_s] == [1, 4, 64] and all(seconds > 0 for _, seconds in found.product_s)
    assert found.attention_cost.flop_s > 0 and set(found.attention_cost.fixed) >= {"gather_q", "ring_kv"}
    assert [rows for rows, _ in found.sharing] == [1, 64] and all(factor >= 1 for _, factor in found.sharing)
    assert found.parallelism == 1 and found.cores >= 1 and found.calls_per_segment and found.memory_gb > 1
    assert not capsys.readouterr().out


def test_layers_with_latent_attention_are_measured_too(quick):
    values = json.loads(Path(tiny_folder("deepseek-v3"), "config.json").read_text())
    bench = measured_layers.LayerBench(Bench(torch.device("cpu"), 1, lambda what: None), load_config(values))
    assert bench.sizes[-2:] == [(2 * 80, 48), (48, 80)]  # gate and up are one product, as in the layer
    found = bench.measure()
    assert [rows for rows, _ in found.product_s] == [1, 4, 64] and all(seconds > 0 for _, seconds in found.product_s)
    assert found.read_s > 0


def test_timings_that_differ_by_more_than_10_percent_are_noted():
    bench = Bench(torch.device("cpu"), 1, lambda what: None)
    assert bench.agreed("a", 1.0, 1.09) == pytest.approx(1.045) and not bench.notes
    assert bench.agreed("b", 1.2, 1.0) == pytest.approx(1.1)
    (note,) = bench.notes
    assert note.startswith("b: two timings differ by 20%")


def test_every_function_is_timed_once_before_the_second_round():
    order: list[str] = []
    bench = Bench(torch.device("cpu"), 1, lambda what: None)
    found = bench.rounds({name: lambda name=name: order.append(name) for name in "ab"})
    assert set(found) == {"a", "b"} and all(seconds >= 0 for seconds in found.values())
    assert [name for name, _ in groupby(order)] == ["a", "b", "a", "b"]


def test_the_typical_time_is_the_lower_quartile():
    assert typical([9.0, 1.0, 2.0, 3.0, 8.0, 4.0, 7.0, 5.0]) == 3.0
    assert typical([2.0]) == 2.0


@pytest.mark.parametrize("width", [None, 16])
def test_a_plain_model_has_the_vocabulary_of_the_given_one_and_runs(quick, width):
    cache = CacheConfig(pages_per_shard=(8,))
    with (
        measured_engine.plain_folder(find_config(str(quick)), 3, width) as folder,
        Engine(EngineConfig(folder, cache=cache)) as engine,
    ):
        model = engine.setup.model
        assert (model.vocab_size, model.num_layers, model.hidden_size) == (512, 3, width or 64)
        assert measured_engine.decode_step(engine, 2, 5, 3) > 0


def test_a_trace_gives_reports_of_the_engine_and_of_its_simulation(quick, machine):
    asks = [TraceRequest(n, 0.01 * n, 20 + n, 6, (n,)) for n in range(5)]
    with measured_engine.plain_folder(find_config(str(quick)), 1, 16) as folder:
        config = EngineConfig(folder, cache=CacheConfig(pages_per_shard=(64,), enable_prefix_caching=False))
        found = check.check_trace(config, machine, asks)
    for report in (found.simulated, found.real):
        assert report.completed == 5 and report.output_tokens == 30 and report.prompt_tokens == 110
        assert report.duration_s >= 0.04 and report.ttft_s.median > 0


def test_errors_of_a_trace_are_relative_to_the_engine():
    """One request with two tokens: in the simulation after 1 s and 2 s, in the engine after 2 s and 4 s."""

    def report(first, last):
        outcome = Outcome(0.0, 0.0, (first, last), 5, 2, 2, False, None)
        return summarise(Finished((outcome,), last, 1, 0.0), None)

    found = check.TraceCheck(report(1.0, 2.0), report(2.0, 4.0))
    assert found.throughput_error == pytest.approx(1.0)
    assert found.ttft_error == pytest.approx(-0.5)


def test_predictions_have_the_definitions_of_the_measurements(machine):
    config = EngineConfig("smollm2-135m", cache=CacheConfig(enable_prefix_caching=False))
    simulated = check._simulated(config, machine)
    begun, each = check._predicted(simulated, 1, 512, 10)
    assert begun > 10 * each > 0
    assert check._predicted(simulated, 4, 512, 10)[0] > 3 * begun


def test_an_error_is_relative_to_the_mean_of_both_measurements():
    row = check.CheckRow("prefill", 512, 1, 1.1, 0.95, 1.0499)
    assert row.error == pytest.approx(0.1, abs=1e-3) and not row.agrees
    assert check.CheckRow("prefill", 512, 1, 1.1, 1.0, 1.05).agrees
    assert not check.CheckRow("prefill", 512, 1, 1.1, 1.0, 1.2).agrees


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output": "here.json"}, "output=here.json"),
        ({"output": "/nowhere/here.yaml"}, "output=/nowhere/here.yaml"),
        ({"executor": "dry"}, "executor=dry"),
        ({"hardware": "here.yaml"}, "add --check"),
        ({"hardware": "h201", "check": "smollm2"}, "h200"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, named):
    with pytest.raises(ConfigError) as error:
        command(**options)
    assert named in str(error.value)
