"""Predictions of published measurements, and errors in the CSV file."""

import re
from pathlib import Path
from statistics import median

import pytest

from longspan.errors import ConfigError
from longspan.planner.predict import Assumed, Prediction, predict, predict_all
from longspan.planner.rows import Row, read_rows

PUBLISHED = Path(__file__).parent / "published.csv"
PAGE = Path(__file__).parents[2] / "docs" / "planner.md"
HEADER = "id,model,hardware,gpus,tp,pcp,dcp,pp,quantity,new_tokens,value,unit\n"
GOOD = "A,llama-3-70b,h100,8,8,1,1,1,ttft,8192,100,ms\n"


@pytest.fixture(scope="module")
def predictions() -> dict[str, Prediction]:
    return {found.id: found for found in predict_all(read_rows(str(PUBLISHED)), Assumed())}


def test_predicted_times_are_close_to_published_ones(predictions):
    errors = [abs(found.error) for name, found in predictions.items() if not name.startswith("K")]
    assert len(errors) == 28
    assert median(errors) < 0.05
    assert max(errors) < 0.15


def test_predicted_capacities_are_close_where_the_setup_is_published(predictions):
    assert all(abs(predictions[name].error) < 0.03 for name in ("K01", "K02", "K03", "K04"))


def test_the_page_tells_the_errors_of_capacities(predictions):
    told = re.search(r"Errors of capacities: (.*?)\. ", PAGE.read_text())[1].replace("−", "-")
    shown = {name: f"{predictions[name].error * 100:+.1f} %" for name in ("K01", "K02", "K03", "K04")}
    assert shown["K01"] == shown["K02"]
    assert told == f"K01 and K02 {shown['K01']}, K03 {shown['K03']}, K04 {shown['K04']}"


@pytest.mark.parametrize(("tokens", "seconds"), [(131_072, 3.8), (1_000_000, 77.0)])
def test_times_on_16_machines_are_predicted_from_constants_of_up_to_4(tokens, seconds):
    row = Row("", "llama-3-405b", "h100-meta", 128, 8, 16, 1, 1, "ttft", "ring_kv", tokens, value=seconds, unit="s")
    assert abs(predict(row).error) < 0.1


@pytest.mark.parametrize(("tokens", "seconds"), [(131_072, 10.5), (1 << 20, 421.0)])
def test_a_pipeline_of_8_stages_is_predicted_with_chunks_of_4096_tokens(tokens, seconds):
    row = Row("", "qwen3-235b-a22b-fp8", "h20-96", 32, 4, 1, 1, 8, "ttft", "", tokens, value=seconds, unit="s")
    assert abs(predict(row, Assumed(max_num_batched_tokens=8 * 4096)).error) < 0.05


def test_stages_shorten_a_prompt_by_less_than_their_number():
    alone, staged = (
        predict(Row("", "llama-3-70b", "h200", pp, 1, 1, 1, pp, "ttft", "", 131_072)).predicted for pp in (1, 8)
    )
    assert alone / 8 < staged < alone


def test_decoding_requests_are_divided_among_the_stages():
    setup = ("", "llama-3-70b", "h200", 8, 1, 1, 1, 8, "ttit", "", 1, 65_536)
    one, eight, nine = (predict(Row(*setup, batch)).predicted for batch in (1, 8, 9))
    assert one == eight < nine


def rows(tmp_path: Path, text: str) -> list[Row]:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return read_rows(str(path))


def test_a_file_may_have_comments_blank_lines_and_missing_values(tmp_path):
    (row,) = rows(tmp_path, f"# a comment\n{HEADER}\n{GOOD.replace(',100,', ',,')}")
    assert (row.id, row.new_tokens, row.value) == ("A", 8192, None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD.replace(",8,8,", ",8,x,"), "line 3: column tp=x: Expected `int`"),
        (GOOD.replace(",8,8,", ",8,0,"), "line 3: column tp=0: Expected `int` >= 1"),
        (GOOD.replace(",8,8,", ",8,,"), "line 3: Object missing required field `tp`"),
        (GOOD.replace("100,ms", "fast,ms"), "line 3: column value=fast: Expected `float"),
        (GOOD.replace("ttft", "latency"), "line 3: column quantity=latency: unknown; use one of ttft"),
        (GOOD.replace(",8,8,", ",16,8,"), "line 3: column gpus=16: tp x pcp x pp = 8"),
        (GOOD.replace("8,8,1,1,1", "8,8,1,3,1"), "line 3: column dcp=3: must divide tensor_parallel_size=8"),
        (GOOD.replace(",ms", ",tokens"), "line 3: column unit=tokens"),
        (GOOD.replace(",ms", ""), "line 3: has more cells than columns, or fewer"),
    ],
)
def test_a_malformed_row_is_refused_with_line_and_column(tmp_path, bad, message):
    with pytest.raises(ConfigError) as caught:
        rows(tmp_path, HEADER + GOOD + bad)
    assert message in str(caught.value).replace(", line", ": line")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER.replace("hardware,", ""), "column hardware is missing"),
        (HEADER.replace("unit", "units"), "column units is unknown"),
        ("", "line 1: no header"),
    ],
)
def test_a_malformed_header_is_refused_with_the_column(tmp_path, header, message):
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path, header)


def test_unknown_hardware_in_a_file_is_refused_with_the_row_and_similar_names(tmp_path):
    with pytest.raises(ConfigError, match=r"row=A: hardware=h10: .* h100"):
        predict_all(rows(tmp_path, HEADER + GOOD.replace("h100", "h10")), Assumed())
