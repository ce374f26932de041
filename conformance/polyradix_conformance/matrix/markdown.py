"""The matrix as one Markdown table, for a README."""

from __future__ import annotations

import re
from html import escape

from polyradix_conformance.matrix.model import STATES, Cell, Column, Json, Matrix, Row, counts, day
from polyradix_conformance.tolerance import K

SPECIAL = re.compile(r"([\\`*_{}\[\]|~])")


def markdown(m: Matrix) -> str:
    """A line per report, the table, the legend and the notes."""
    verdicts = [f"- {_verdict(r)}" for c in m.columns for r in c.reports]
    table = [line(["", *map(_head, m.columns)]), "|---|" + "---|" * len(m.columns), *(_row(m, r) for r in m.rows)]
    legend = "; ".join(f"{symbol} {words}" for symbol, words in STATES.values())
    how = (
        f"Cells: cases passed / cases (largest error, as a multiple of the rounding floor, of which {K:g} is allowed; "
        f"share of the device's roofline, where it was timed). {legend}."
    )
    notes = [f"- {text(n)}" for n in m.notes]
    return "\n\n".join("\n".join(part) for part in (verdicts, table, [how], notes) if part) + "\n"


def _verdict(r: Json) -> str:
    emulated = ", **emulated**" if r["emulated"] else ""
    why = f": {text('; '.join(r['reasons']))}" if r["reasons"] else ""
    result = f"**{r['verdict']}**{why}"
    return f"{text(r['backend'])} on {text(r['device'])}{emulated}, {r['profile']}: {result} ({counts(r)}), {day(r)}"


def _head(c: Column) -> str:
    r = c.last
    emulated = ["**emulated**"] if r["emulated"] else []
    version = f"suite {r['suite']}, protocol {'.'.join(map(str, r['protocol']))}"
    return "<br>".join([text(r["backend"]), *emulated, text(r["device"]), day(r), text(version)])


def _row(m: Matrix, row: Row) -> str:
    title = f"**{text(row.title)}**" if row.heading else text(row.title)
    return line([title, *(_cell(m.cell(row, c)) if row.counted else "" for c in m.columns)])


def _cell(c: Cell) -> str:
    if not c.total:
        return c.symbol
    numbers = [f"{c.worst:.2f}x"] if c.worst is not None else []
    numbers += [c.roofline] if c.roofline else []
    return f"{c.symbol} {c.passed}/{c.total}" + (f" ({'; '.join(numbers)})" if numbers else "")


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(value: str) -> str:
    """Any text as itself: no markup, no table cell of its own."""
    return SPECIAL.sub(r"\\\1", escape(" ".join(value.split()), quote=False))
