"""Pictures for `--plot`, looked at as Matplotlib's figures."""

import math
import sys
from types import SimpleNamespace

import pytest

from longspan.attention.schedules import SCHEDULES
from longspan.bench.schedules import HEAD_SHAPES, CellResult, ScheduleCell, ScheduleTiming
from longspan.bench.serving.report import Spread
from longspan.cli import plots
from longspan.config import CostConstants
from longspan.errors import ConfigError
from longspan.planner.simulate.run import Memory


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def result(new: int, chosen: str, best: str = "ring_q") -> CellResult:
    seconds = {chosen: 1.5, best: 1.0}
    timings = tuple(ScheduleTiming(name, value, value, 1, 1) for name, value in seconds.items())
    return CellResult(ScheduleCell(HEAD_SHAPES[0], 1, 2, 1, new, 100), timings, chosen, CostConstants())


def test_a_map_has_the_fastest_schedule_in_each_box_and_the_choice_where_it_differs(matplotlib):
    (panel,) = plots.schedule_map([result(1, "ring_q"), result(8, "gather_q")], "winners").axes
    assert [text.get_text() for text in panel.texts] == ["ring_q", "ring_q", "gather_q +50%"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "8"]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("cached tokens", "new tokens")


@pytest.mark.parametrize("name", SCHEDULES)
def test_small_white_text_is_readable_on_every_schedules_box(matplotlib, name):
    (panel,) = plots.schedule_map([result(1, name, name)], "winners").axes
    parts = panel.patches[0].get_facecolor()[:3]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    contrast = 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    assert contrast > 4.5  # as WCAG asks of small text


def test_no_text_of_a_map_is_wider_than_its_box(matplotlib):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plots.schedule_map([result(1, "gather_q", "gather_q_rs"), result(8, "gather_q_rs", "tree_q")], "winners")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (panel,) = figure.axes
    box = min(patch.get_window_extent().width for patch in panel.patches)
    assert max(text.get_window_extent(canvas.get_renderer()).width for text in panel.texts) < box


def report(concurrency: int | None, ttft: Spread | None) -> SimpleNamespace:
    return SimpleNamespace(concurrency=concurrency, ttft_s=ttft, tpot_s=None)


def test_latencies_are_lines_over_the_runs_in_milliseconds(matplotlib):
    runs = [report(1, Spread(1, 0.5, 2, 3)), report(8, None), report(None, Spread(2, 1.5, 3, 4))]
    first, per_token = plots.latency_lines(runs, "a <model> & $more").axes
    median = first.lines[0].get_ydata()
    assert (median[0], median[2]) == (500, 1500) and math.isnan(median[1])
    assert [line.get_label() for line in per_token.lines] == ["median", "p90", "p99"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "8", "all"]


def test_the_line_of_a_layout_ends_where_no_request_fits(matplotlib):
    lines = {"tp=8": [plots.Point(1024, 1.0, 9), plots.Point(1 << 20, math.inf, 0)], "tp=4": []}
    ttft, requests = plots.layout_lines(lines, "layouts").axes
    assert list(ttft.lines[0].get_xdata()) == list(requests.lines[0].get_xdata()) == [1024]
    assert [label.get_text() for label in ttft.get_xticklabels()] == ["1k", "1M"]


def test_memory_has_a_row_for_each_shard_of_each_instance(matplotlib):
    memory = Memory(2.0, (10, 20), (((0, 5), (20, 10)), ((0, 0), (0, 0))), ((5, 20), (0, 0)))
    panel = plots.memory_map(memory, "memory").axes[0]
    assert panel.images[0].get_array().tolist() == [[0, 0.5], [1, 0.5], [0, 0], [0, 0]]
    assert panel.images[0].get_extent() == [0, 4, 4, 0]


def test_a_picture_is_an_svg_file_with_its_title_as_text(matplotlib, tmp_path):
    plots.save(plots.layout_lines({}, "a <model> & $more"), tmp_path / "x.svg")
    assert "a &lt;model&gt; &amp; $more" in (tmp_path / "x.svg").read_text()


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plot=.*x.svg: Matplotlib is not installed; .*longspan\[plot\]"):
        plots.check_plot(tmp_path / "x.svg")


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"plot=/nowhere/x\.svg: its folder"):
        plots.check_plot("/nowhere/x.svg")
