"""Cumulative distributions as a plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, EDGE = 420, 260, 40
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#7f7f7f")


def svg(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A panel for each title, a line for each name: the cumulative share of its values, which are milliseconds."""
    parts = [_panel(i, title, lines) for i, (title, lines) in enumerate(panels.items())]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="none"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(index: int, title: str, lines: Mapping[str, Sequence[float]]) -> str:
    most = max((max(values) for values in lines.values() if values), default=1.0) or 1.0
    wide, high = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
    out = [f'<g transform="translate({index * WIDTH + EDGE},{EDGE})">', _text(wide / 2, -12, f"{title}, ms", "middle")]
    out.append(f'<rect width="{wide}" height="{high}" stroke="#888"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        out.append(_text(-4, high * (1 - share) + 4, f"{share:.0%}", "end"))
        out.append(_text(wide * share, high + 14, f"{most * share:.3g}", "middle"))
    for i, (name, values) in enumerate(lines.items()):
        if values:
            color = COLORS[i % len(COLORS)]
            out.append(f'<polyline points="{_points(values, most, wide, high)}" stroke="{color}" stroke-width="1.5"/>')
            out.append(_text(wide - 4, high - 6 - 13 * i, name, "end", color))
    return "\n".join([*out, "</g>"])


def _points(values: Sequence[float], most: float, wide: float, high: float) -> str:
    shares = np.linspace(0, 1, min(len(values), 200) + 1)
    x = np.quantile(np.array(values), shares) / most * wide
    return " ".join(f"{a:.1f},{high * (1 - s):.1f}" for a, s in zip(x, shares, strict=True))


def _text(x: float, y: float, text: str, anchor: str, color: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
