"""The command `longspan simulate`: report, plot, notes and errors."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from longspan.cli.simulate import simulate
from longspan.errors import LongspanError


@pytest.fixture
def trace(tmp_path):
    rows = [
        {"timestamp": 300 * n, "input_length": 1000 + 10 * n, "output_length": 30, "hash_ids": [0, n + 1, n + 50]}
        for n in range(20)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_report_has_the_fields_of_bench_serve_and_memory(trace, capsys):
    simulate("llama-3-70b", "h200", trace, "tp=8,dcp=8", instances=2, as_json=True)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["report"]["completed"] == 20 and found["report"]["output_tokens"] == 600
    assert 0 < found["report"]["ttft_s"]["median"] < found["report"]["e2e_s"]["median"]
    assert sum(found["requests_by_instance"]) == 20
    assert [len(shards) for shards in found["memory"]["used"]] == [8, 8]
    assert "first token" in err and "KV pages in use" in err


def test_the_plot_is_written(trace, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "memory.svg"
    simulate("llama-3-70b", "h200", trace, "tp=8,dcp=8", instances=2, plot=str(plot))
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_without_json_nothing_goes_to_stdout(trace, capsys):
    simulate("llama-3-70b", "h200", trace, "tp=8", num_requests=2)
    assert not capsys.readouterr().out


def test_a_trace_with_too_few_requests_and_requests_beyond_the_models_positions_are_noted(trace, capsys):
    simulate("smollm2-135m", "h200", trace, num_requests=30, as_json=True)
    assert json.loads(capsys.readouterr().out)["notes"] == ["the trace has only 20 of 30 requests"]


@pytest.mark.parametrize("ids", [None, []])
def test_prompts_without_block_ids_share_no_prefix(tmp_path, capsys, ids):
    rows = [{"timestamp": 9000 * n, "input_length": 3000, "output_length": 3} for n in range(3)]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row if ids is None else {**row, "hash_ids": ids}) for row in rows))
    simulate("llama-3.1-8b", "h200", str(path), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["report"]["completed"], found["cached_tokens"]) == (3, 0)


def test_the_default_layout_is_the_smallest_that_fits(trace, capsys):
    simulate("llama-3-70b", "h200", trace, as_json=True)
    assert json.loads(capsys.readouterr().out)["layout"] == "tp=2,pcp=1,dcp=1,pp=1"


def test_the_trace_is_read_before_the_layout_is_checked(tmp_path):
    with pytest.raises(LongspanError, match="trace="):
        simulate("llama-3-70b", "h200", str(tmp_path / "none"), layout="tp=7")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "llama-3-71b"}, "llama-3-70b"),
        ({"hardware": "h201"}, "h200"),
        ({"layout": "tp=8,dpc=2"}, "dpc=2"),
        ({"layout": "tp=8,dcp=3"}, "decode_context_parallel_size=3"),
        ({"layout": "tp=7"}, "tensor_parallel_size=7"),
        ({"layout": "tp=1"}, "GB"),
        ({"instances": 0}, "instances=0"),
        ({"kv_cache_dtype": "int5"}, "kv_cache_dtype=int5"),
        ({"trace": "/nowhere/trace.jsonl"}, "trace=/nowhere/trace.jsonl"),
        ({"plot": "/nowhere/plot.svg"}, "plot=/nowhere/plot.svg"),
    ],
)
def test_invalid_input_is_refused_with_field_and_remedy(trace, changed, named):
    options = {"model": "llama-3-70b", "hardware": "h200", "trace": trace, "layout": "tp=8,dcp=8", **changed}
    with pytest.raises(LongspanError) as error:
        simulate(**options)
    assert named in str(error.value)
