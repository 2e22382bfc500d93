"""Pictures of results, for `--plot`: which schedule wins where, latencies, layouts, KV pages over time.

It owns what they look like; Matplotlib draws them and is imported only here, when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
_LAYOUT_PANELS = {"time to first token, s": "ttft", "requests that fit": "requests"}
_MAPS_A_ROW = 3
_MAP_LEGEND = "Bold: the fastest. Below it, where the engine chooses another: its choice, and how much slower that is."
_MAP_SHADE = 0.75  # schedules' colours are darkened by this, so that small white text is readable on them
_BOX = (1.08, 0.5)  # inches of a situation in a map
_PANEL = (4.8, 3.6)  # inches of a panel with axes


@dataclass(frozen=True)
class Point:
    """One layout at one length of context."""

    context: int  # tokens
    ttft: float  # seconds to the first token
    requests: int  # that fit


def check_plot(path: str | Path | None) -> None:
    """Before anything is measured. Raises `ConfigError` if a picture is asked for that cannot be drawn there."""
    if path is None:
        return
    require(Path(path).parent.is_dir(), "plot", path, "its folder does not exist", "make the folder first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        remedy = "install the extra: pip install 'longspan[plot]'"
        raise ConfigError("plot", path, "Matplotlib is not installed", remedy) from error


def save(figure: Figure, path: str | Path) -> None:
    """Write the SVG, with text as text. Raises `ConfigError`."""
    from matplotlib import rc_context

    try:
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(path, format="svg")
    except OSError as error:
        raise ConfigError("plot", path, f"cannot be written ({error.strerror})", "name another file") from error


def schedule_map(results: Sequence[CellResult], title: str) -> Figure:
    """A map for each layout and head shape, new tokens down and cached ones across.

    Each box has the fastest schedule, and the automatic choice with what it loses where they differ.
    """
    maps: dict[str, list[CellResult]] = {}
    for result in results:
        cell = result.cell
        maps.setdefault(f"{cell.heads.name}, tp {cell.tp} pcp {cell.pcp} dcp {cell.dcp}", []).append(result)
    news, cached = (sorted({getattr(result.cell, name) for result in results}) for name in ("new", "cached"))
    across = min(_MAPS_A_ROW, len(maps))
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
    """The box of a situation in a map, around (x, y)."""
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
    """Time to first token beside time per output token: lines of median, p90 and p99 over the runs."""
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


def layout_lines(lines: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Time to first token and requests that fit, against context: a line a layout, which ends where nothing fits."""
    figure, axes = _panels(title, 1, 2, _PANEL)
    for panel, (name, field) in zip(axes, _LAYOUT_PANELS.items(), strict=True):
        panel.set(title=name, xlabel="tokens of context")
        for layout, points in lines.items():
            drawn = [(point.context, getattr(point, field)) for point in points if 0 < getattr(point, field) < inf]
            panel.loglog([x for x, _ in drawn], [y for _, y in drawn], "o-", label=layout)
        contexts = sorted({point.context for points in lines.values() for point in points})
        panel.set_xticks(contexts, map(_tokens, contexts), minor=False)
        panel.minorticks_off()
        panel.grid(axis="y")
    if lines:
        axes[0].legend()
    return figure


def memory_map(memory: Memory, title: str) -> Figure:
    """KV pages in use over time: a row for each shard of each instance, the darker the fuller."""
    shards, instances = len(memory.pages_per_shard), len(memory.used)
    rows = [
        [count / pages for count in row or (0,)]
        for instance in memory.used for pages, row in zip(memory.pages_per_shard, instance, strict=True)
    ]  # fmt: skip
    figure, (panel,) = _panels(title, 1, 1, (10, 1.5 + 0.1 * len(rows)))
    ends = (0, memory.interval_s * len(rows[0]), len(rows), 0)
    picture = panel.imshow(rows, "Blues", aspect="auto", vmin=0, vmax=1, extent=ends, interpolation="nearest")
    panel.set_yticks([(n + 0.5) * shards for n in range(instances)], [f"instance {n}" for n in range(instances)])
    for n in range(1, instances):
        panel.axhline(n * shards, color="grey", linewidth=0.5)
    panel.set_xlabel("seconds")
    figure.colorbar(picture, label="part of a shard's KV pages in use")
    return figure


def _panels(title: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, each of `size` inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(hspace=0.08)  # a part of a panel's height between rows
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.5), layout=layout)
    figure.suptitle(title, parse_math=False)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _tokens(count: int) -> str:
    return f"{count / 2**20:.3g}M" if count >= 1 << 20 else f"{count / 1024:.3g}k" if count >= 1024 else str(count)
