"""Plots for `--plot`: the fastest schedules, latencies, layouts, KV pages over time.

It owns the form of the plots. Matplotlib is an extra: it is imported only here, and only when a plot is requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.attention.schedules import SCHEDULES
from longspan.config import require
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from longspan.bench.schedules import CellResult
    from longspan.bench.serving.report import RunReport
    from longspan.planner.simulate.run import Memory

_SPREADS = ("median", "p90", "p99")
_LATENCIES = {"time to first token, ms": "ttft_s", "time per output token, ms": "tpot_s"}
_TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_MAPS_PER_ROW = 3
_MAP_LEGEND = "Bold: the fastest schedule. Below it: the engine's choice if it differs, and how much slower it is."
_MAP_SHADE = 0.75  # colours of schedules are multiplied by this, so that small white text is readable on them
_BOX = (1.08, 0.5)  # inches of a box in `schedule_map`
_PANEL = (4.8, 3.6)  # inches of a panel in `latency_lines`
_SCATTER = (7.5, 5.0)  # inches of the panel in `layout_scatter`
_LABEL_ROW = 16  # pixels between two labels in `layout_scatter`
_SHARD_ROW, _MIN_ROW = 0.3, 0.18  # inches of a shard in `memory_map`, and of the smallest row with a label
_MIN_MAP, _MAX_MAP = 1.2, 7.0  # minimum and maximum height in inches of the panel in `memory_map`


@dataclass(frozen=True)
class LayoutPoint:
    """One layout in `layout_scatter`."""

    name: str  # as in `tp8 dcp2`
    ttft: float  # time to first token, seconds
    tpot: float  # time per output token, seconds
    best: bool  # whether it is in the Pareto set


def check_plot(path: str | Path | None) -> None:
    """Raise `ConfigError` if a plot is requested that cannot be drawn or written. To be called before measuring."""
    if path is None:
        return
    require(Path(path).parent.is_dir(), "plot", path, "its folder does not exist", "create the folder first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        remedy = "install the extra: pip install 'longspan[plot]'"
        raise ConfigError("plot", path, "Matplotlib is not installed", remedy) from error


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as SVG, with text as text instead of paths. Raises `ConfigError`."""
    from matplotlib import rc_context

    try:
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(path, format="svg")
    except OSError as error:
        raise ConfigError("plot", path, f"cannot be written ({error.strerror})", "give another file") from error


def schedule_map(results: Sequence[CellResult], title: str) -> Figure:
    """A panel for each layout and head shape: new tokens from top to bottom, cached tokens from left to right.

    Each box names the fastest schedule, and the automatic choice with its regret if it is another one.
    """
    maps: dict[str, list[CellResult]] = {}
    for result in results:
        cell = result.cell
        maps.setdefault(f"{cell.heads.name}, tp {cell.tp} pcp {cell.pcp} dcp {cell.dcp}", []).append(result)
    news, cached = (sorted({getattr(result.cell, name) for result in results}) for name in ("new", "cached"))
    across = min(_MAPS_PER_ROW, len(maps))
    size = (len(cached) * _BOX[0] + 0.6, len(news) * _BOX[1] + 0.7)
    figure, axes = _panels(f"{title}\n{_MAP_LEGEND}", ceil(len(maps) / across), across, size)
    for panel, (name, members) in zip(axes, maps.items(), strict=False):
        panel.set_title(name, fontsize=10, fontweight="bold")
        panel.set_xticks(range(len(cached)), [f"{tokens:,}" for tokens in cached])
        panel.set_yticks(range(len(news)), [f"{tokens:,}" for tokens in news])
        panel.set(xlim=(-0.5, len(cached) - 0.5), ylim=(len(news) - 0.5, -0.5))
        panel.set(xlabel="cached tokens", ylabel="new tokens")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        for result in members:
            _draw_box(panel, cached.index(result.cell.cached), news.index(result.cell.new), result)
    for unused in axes[len(maps) :]:
        unused.set_axis_off()
    return figure


def _draw_box(panel: Axes, x: int, y: int, result: CellResult) -> None:
    """Draw the box of one case, centred at (x, y)."""
    from matplotlib.colors import to_rgb

    best = result.best.schedule
    agrees = result.chosen == best
    colour = tuple(part * _MAP_SHADE for part in to_rgb(SCHEDULES[best].colour))
    panel.bar(x, 0.96, 0.97, y - 0.48, color=colour)
    text: dict[str, Any] = {"x": x, "ha": "center", "va": "center", "color": "white"}
    panel.text(y=y if agrees else y - 0.18, s=best, fontsize=9, fontweight="bold", **text)
    if not agrees:
        panel.text(y=y + 0.22, s=f"{result.chosen} +{result.regret:.0%}", fontsize=8, **text)


def latency_lines(reports: Sequence[RunReport], title: str) -> Figure:
    """Two panels, time to first token and time per output token: median, p90 and p99 over the concurrency."""
    figure, axes = _panels(title, 1, len(_LATENCIES), _PANEL)
    limits = ["all" if report.concurrency is None else str(report.concurrency) for report in reports]
    for panel, (name, field) in zip(axes, _LATENCIES.items(), strict=True):
        spreads = [getattr(report, field) for report in reports]
        for line in _SPREADS:
            panel.plot(limits, [getattr(spread, line) * 1e3 if spread else nan for spread in spreads], "o-", label=line)
        panel.set(title=name, xlabel="requests at once")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y")
        panel.legend()
    return figure


def layout_scatter(points: Sequence[LayoutPoint], title: str) -> Figure:
    """Time per output token over time to first token. The Pareto set is labelled and connected by a line."""
    figure, (panel,) = _panels(title, 1, 1, _SCATTER)
    best = sorted((point for point in points if point.best), key=lambda point: (point.ttft, -point.tpot))
    others = [point for point in points if not point.best]
    panel.loglog([p.ttft for p in others], [p.tpot * 1e3 for p in others], "o", color="0.75", label="other layouts")
    panel.loglog([p.ttft for p in best], [p.tpot * 1e3 for p in best], "o-", label="Pareto set")
    panel.set(xlabel="time to first token, s", ylabel="time per output token, ms")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("{x:,g}")
        axis.get_minor_locator().set_params(subs=(2, 5))  # type: ignore[call-arg]
    panel.margins(0.15)
    panel.grid(which="both", color="0.92")
    panel.set_axisbelow(True)
    _label_points(panel, best)
    panel.legend(loc="upper right", frameon=False)
    return figure


def _label_points(panel: Axes, points: Sequence[LayoutPoint]) -> None:
    """Label each point at its lower left, where the falling line is not. Labels that would overlap are moved down."""
    panel.figure.draw_without_rendering()  # type: ignore[union-attr]  # computes the positions of points
    last = inf
    for point in points:
        _, height = panel.transData.transform((point.ttft, point.tpot * 1e3))
        drop = max(0.0, height - last + _LABEL_ROW)
        last = height - drop
        panel.annotate(
            point.name, (point.ttft, point.tpot * 1e3), (-7, -5 - drop * 72 / panel.figure.dpi),
            textcoords="offset points", ha="right", va="top", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if drop else None,
        )  # fmt: skip


def memory_map(memory: Memory, title: str) -> Figure:
    """KV pages in use over time: a row for each shard of each instance; darker means more pages in use."""
    shards, instances = len(memory.pages_per_shard), len(memory.used)
    rows = [
        [count / pages for count in row or (0,)]
        for instance in memory.used for pages, row in zip(memory.pages_per_shard, instance, strict=True)
    ]  # fmt: skip
    height = max(_MIN_MAP, min(_SHARD_ROW * len(rows), _MAX_MAP))
    figure, (panel,) = _panels(title, 1, 1, (10, 1 + height))
    seconds = memory.interval_s * len(rows[0])
    scale, unit = next((scale, unit) for scale, unit in _TIME_UNITS if seconds >= 2 * scale or scale == 1)
    ends = (0, seconds / scale, len(rows), 0)
    picture = panel.imshow(rows, "Blues", aspect="auto", vmin=0, vmax=1, extent=ends, interpolation="nearest")
    least = ceil(len(rows) * _MIN_ROW / height)  # shards per label, so that labels do not overlap
    every = next((n for n in range(least, shards) if shards % n == 0), shards * ceil(least / shards))
    named = range(0, len(rows), every)
    name = "shard {shard}" if instances == 1 else "instance {instance}, shard {shard}"
    labels = [name.format(instance=row // shards, shard=row % shards) for row in named]
    panel.set_yticks([row + 0.5 for row in named], labels)
    for n in range(1, instances):
        panel.axhline(n * shards, color="grey", linewidth=0.8)
    panel.set_xlabel(unit)
    bar = figure.colorbar(picture, label="KV pages in use")
    bar.ax.yaxis.set_major_formatter(lambda part, _: f"{part:.0%}")
    return figure


def _panels(title: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, each of `size` (width, height) in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(hspace=0.08)  # space between rows as a fraction of a panel
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.5), layout=layout)
    figure.suptitle(title, parse_math=False)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)
