"""A picture of layouts: time to first token and requests that fit, against the length of the context.

It owns the drawing (SVG); what is drawn it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#4c78a8", "#f28e2b", "#59a14f", "#e15759")
MOST_LINES = len(_COLOURS)
_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _LINE = 320, 220, 70, 64, 430, 16


@dataclass(frozen=True)
class Point:
    """One layout at one length of context: seconds, and requests that fit."""

    context: int
    ttft: float
    requests: int


def layout_plot(lines: Mapping[str, Sequence[Point]], title: str) -> str:
    """The SVG: a line for each layout, on logarithmic axes; a line ends where no request fits."""
    height = _TOP + _HEIGHT + 56 + _LINE * len(lines)
    panels = {
        "time to first token, s": {name: [(p.context, p.ttft) for p in points] for name, points in lines.items()},
        "requests that fit": {name: [(p.context, float(p.requests)) for p in points] for name, points in lines.items()},
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * _PANEL}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, (name, series) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({number * _PANEL + _LEFT},{_TOP})">')
        parts += [f'<text x="0" y="-16" font-weight="bold">{escape(name)}</text>', *_panel(series)]
        parts.append("</g>")
    for number, (name, colour) in enumerate(zip(lines, _COLOURS, strict=False)):
        y = _TOP + _HEIGHT + 52 + number * _LINE
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(_LEFT + 16, y, "start", name))
    return "\n".join([*parts, "</svg>\n"])


def _panel(series: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    drawn = {name: [(x, y) for x, y in points if 0 < y < math.inf] for name, points in series.items()}
    contexts = sorted({x for points in drawn.values() for x, _ in points})
    values = [y for points in drawn.values() for _, y in points]
    if not values:
        return [_text(_WIDTH / 2, _HEIGHT / 2, "middle", "nothing fits")]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    left, right = math.log2(contexts[0]), math.log2(contexts[-1])

    def place(context: float, value: float) -> tuple[float, float]:
        across = (math.log2(context) - left) / ((right - left) or 1.0)
        return across * _WIDTH, _HEIGHT * (high - math.log10(value)) / (high - low)

    parts = []
    for power in range(low, high + 1):
        y = place(contexts[0], 10.0**power)[1]
        parts += [f'<path d="M0 {y:.1f}H{_WIDTH}" stroke="#ddd"/>', _text(-6, y + 4, "end", f"{10.0**power:g}")]
    for context in contexts:
        parts.append(_text(place(context, 10.0**low)[0], _HEIGHT + 16, "middle", _tokens(context)))
    parts.append(_text(_WIDTH / 2, _HEIGHT + 34, "middle", "tokens of context"))
    for (_, points), colour in zip(drawn.items(), _COLOURS, strict=False):
        path = [place(x, y) for x, y in points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in path]
    return parts


def _tokens(count: int) -> str:
    return f"{count / 2**20:.3g}M" if count >= 1 << 20 else f"{count / 1024:.3g}k" if count >= 1024 else str(count)


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
