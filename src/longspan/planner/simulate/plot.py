"""A picture of memory over time: a row for each shard of each instance, the darker the fuller.

It owns the drawing (SVG); what was simulated it is given.
"""

from __future__ import annotations

from html import escape

from longspan.planner.simulate.run import Memory

_WIDTH, _LEFT, _TOP, _TICKS = 800, 96, 60, 4
_ROW, _GAP = 9, 4
_SHADES = 20


def memory_plot(memory: Memory, title: str) -> str:
    """The SVG: time goes right, white is empty and the darkest blue full."""
    shards = len(memory.pages_per_shard)
    block = shards * _ROW + _GAP
    height = len(memory.used) * block
    samples = max(len(memory.used[0][0]), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 24}" height="{_TOP + height + 40}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
        *_legend(),
        f'<g transform="translate({_LEFT},{_TOP})">',
    ]
    for number, used in enumerate(memory.used):
        top = number * block
        parts.append(f'<text x="-6" y="{top + shards * _ROW / 2 + 4}" text-anchor="end">instance {number}</text>')
        for shard, (pages, row) in enumerate(zip(memory.pages_per_shard, used, strict=True)):
            parts += _row(row, pages, top + shard * _ROW, _WIDTH / samples)
        parts.append(f'<rect y="{top}" width="{_WIDTH}" height="{shards * _ROW}" fill="none" stroke="#999"/>')
    for tick in range(_TICKS + 1):
        seconds = memory.interval_s * samples * tick / _TICKS
        x = _WIDTH * tick / _TICKS
        parts.append(f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle">{seconds:,.4g} s</text>')
    return "\n".join([*parts, "</g>", "</svg>\n"])


def _row(used: tuple[int, ...], pages: int, top: int, step: float) -> list[str]:
    """Neighbours of one shade are one box."""
    parts: list[str] = []
    shades = [round(_SHADES * count / pages) for count in used]
    start = 0
    for at in range(1, len(shades) + 1):
        if at == len(shades) or shades[at] != shades[start]:
            if shades[start]:
                parts.append(
                    f'<rect x="{start * step:.1f}" y="{top}" width="{(at - start) * step:.1f}" height="{_ROW}" '
                    f'fill="{_colour(shades[start])}"/>'
                )
            start = at
    return parts


def _legend() -> list[str]:
    boxes = [
        f'<rect x="{_LEFT + shade * 8}" y="34" width="8" height="10" fill="{_colour(shade)}"/>'
        for shade in range(_SHADES + 1)
    ]
    end = _LEFT + (_SHADES + 1) * 8
    return [
        f'<text x="{_LEFT - 6}" y="43" text-anchor="end">KV pages: none</text>', *boxes,
        f'<text x="{end + 6}" y="43">all in use</text>',
    ]  # fmt: skip


def _colour(shade: int) -> str:
    part = shade / _SHADES
    red, green, blue = (round(255 + (dark - 255) * part) for dark in (8, 48, 107))
    return f"#{red:02x}{green:02x}{blue:02x}"
