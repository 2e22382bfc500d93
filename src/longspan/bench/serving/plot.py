"""A picture of latency against concurrency: time to first token beside time per output token.

It owns the drawing (SVG); what was measured it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from longspan.bench.serving.report import RunReport, Spread

_COLOURS = {"median": "#4c78a8", "p90": "#f28e2b", "p99": "#e15759"}
_PANELS = {"time to first token, ms": "ttft_s", "time per output token, ms": "tpot_s"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _TICKS = 300, 200, 60, 64, 400, 4


def latency_plot(reports: Sequence[RunReport], title: str) -> str:
    """The SVG: a line each for median and p99 over the runs in order, or bars where there is one run."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(_PANELS) * _PANEL}" height="{_TOP + _HEIGHT + 56}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, (name, field) in enumerate(_PANELS.items()):
        spreads: list[Spread | None] = [getattr(report, field) for report in reports]
        parts.append(f'<g transform="translate({number * _PANEL + _LEFT},{_TOP})">')
        parts += _panel(name, [_label(report) for report in reports], spreads)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _label(report: RunReport) -> str:
    return "all" if report.concurrency is None else str(report.concurrency)


def _panel(name: str, labels: Sequence[str], spreads: Sequence[Spread | None]) -> list[str]:
    bars = len(labels) == 1
    lines = tuple(_COLOURS) if bars else ("median", "p99")
    values = {line: [None if spread is None else getattr(spread, line) * 1000 for spread in spreads] for line in lines}
    top = _round_up(max((value for line in values.values() for value in line if value is not None), default=1.0))
    step = _WIDTH / len(labels)
    parts = [f'<text x="0" y="-24" font-weight="bold">{escape(name)}</text>', *_axis(top)]
    parts += [_text((i + 0.5) * step, _HEIGHT + 16, "middle", label) for i, label in enumerate(labels)]
    parts.append(_text(_WIDTH / 2, _HEIGHT + 36, "middle", "requests at once"))
    for number, line in enumerate(lines):
        colour = _COLOURS[line]
        parts.append(f'<rect x="{number * 80}" y="-16" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(number * 80 + 14, -7, "start", line))
        points = [
            ((i + 0.5) * step, _HEIGHT * (1 - value / top)) for i, value in enumerate(values[line]) if value is not None
        ]
        parts += _bar(number, points, colour) if bars else _line(points, colour)
    return parts


def _axis(top: float) -> list[str]:
    parts = []
    for tick in range(_TICKS + 1):
        y = _HEIGHT * (1 - tick / _TICKS)
        parts.append(f'<path d="M0 {y:.1f}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(-6, y + 4, "end", f"{top * tick / _TICKS:,g}"))
    return parts


def _line(points: Sequence[tuple[float, float]], colour: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *dots]


def _bar(number: int, points: Sequence[tuple[float, float]], colour: str) -> list[str]:
    width = _WIDTH / 5
    left = width * (number + 1)
    return [
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{width - 8:.1f}" height="{_HEIGHT - y:.1f}" fill="{colour}"/>'
        for _, y in points
    ]


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten: quarters of it are round too."""
    power = 1e-3
    while True:
        for factor in (1, 2, 4, 8):
            if factor * power >= value:
                return factor * power
        power *= 10
