"""A picture of which schedule wins where: one panel a layout and head shape, new tokens against cached ones.

It owns the drawing (SVG); what was measured it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from longspan.attention.schedules import SCHEDULES
from longspan.bench.schedules import Cell, CellResult

_BOX, _TEXT, _TOP, _LEFT, _GAP, _PER_ROW = (92, 44), 11, 64, 60, 28, 3


def heatmap(results: Sequence[CellResult], title: str) -> str:
    """The SVG: each box has the fastest schedule, and the automatic choice with what it loses where they differ."""
    panels: dict[str, list[CellResult]] = {}
    for result in results:
        panels.setdefault(_panel_name(result.cell), []).append(result)
    news = sorted({result.cell.new for result in results})
    cached = sorted({result.cell.cached for result in results})
    width, height = len(cached) * _BOX[0] + _LEFT + _GAP, len(news) * _BOX[1] + _TOP + _GAP
    across = min(_PER_ROW, len(panels))
    down = -(-len(panels) // across)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across * width}" height="{down * height + 40}" '
        f'font-family="sans-serif" font-size="{_TEXT}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, (name, members) in enumerate(panels.items()):
        x, y = (number % across) * width, (number // across) * height + 30
        parts.append(_panel(name, members, news, cached, x, y))
    return "\n".join([*parts, "</svg>\n"])


def _panel_name(cell: Cell) -> str:
    return f"{cell.heads.name}, tp {cell.tp} pcp {cell.pcp} dcp {cell.dcp}"


def _panel(name: str, members: Sequence[CellResult], news: list[int], cached: list[int], x: int, y: int) -> str:
    parts = [f'<g transform="translate({x},{y})"><text x="8" y="20" font-weight="bold">{escape(name)}</text>']
    parts += [
        f'<text x="{_LEFT + (i + 0.5) * _BOX[0]}" y="{_TOP - 8}" text-anchor="middle">{tokens:,} cached</text>'
        for i, tokens in enumerate(cached)
    ]
    parts += [
        f'<text x="{_LEFT - 6}" y="{_TOP + (i + 0.6) * _BOX[1]}" text-anchor="end">{tokens:,} new</text>'
        for i, tokens in enumerate(news)
    ]
    for result in members:
        left, top = _LEFT + cached.index(result.cell.cached) * _BOX[0], _TOP + news.index(result.cell.new) * _BOX[1]
        best = result.best.schedule
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_BOX[0] - 2}" height="{_BOX[1] - 2}" '
            f'fill="{SCHEDULES[best].colour}"/>'
            f'<text x="{left + 6}" y="{top + 17}" fill="white">{best}</text>'
        )
        if result.chosen != best:
            note = f"{result.chosen} +{result.regret:.0%}"
            parts.append(f'<text x="{left + 6}" y="{top + 33}" fill="white" font-size="9">auto: {note}</text>')
    return "\n".join([*parts, "</g>"])
