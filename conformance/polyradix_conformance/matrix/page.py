"""The matrix as one HTML page that needs nothing else: no network, and no script but for the panel behind a cell."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from polyradix_conformance.matrix.model import STATES, STATUSES, Column, Json, Matrix, Row, counts, day, subject_of
from polyradix_conformance.tolerance import K

HERE = Path(__file__).parent
CASE_FIELDS = ("id", "status", "seconds", "error_to_floor", "detail", "waiver", "problem")
PERF_FIELDS = ("id", "status", "seconds", "share", "bound", "detail")


def page(m: Matrix) -> str:
    """The whole document. Only the script whose hash it names may run in it."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    reports = [(c, r) for c in m.columns for r in c.reports]
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return env.get_template("page.html.j2").render(
        m=m,
        reports=reports,
        conformant=sum(not r["reasons"] for _, r in reports),
        groups=[list(rows) for _, rows in groupby(m.rows, key=lambda r: r.group)],
        k=K,
        states=STATES,
        data=_data(m),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        cell_id=cell_id,
        counts=counts,
        day=day,
        fact_names=fact_names(m),
        bad_rows=bad_rows,
        protocol=protocol,
    )


def cell_id(row: Row, column: Column) -> str:
    """The fragment that opens a cell; the same from one run to the next."""
    return f"{row.slug}.{column.slug}"


def protocol(report: Json) -> str:
    return ".".join(map(str, report["protocol"]))


def fact_names(m: Matrix) -> list[str]:
    """Of all columns, in the order they first come."""
    return list(dict.fromkeys(name for c in m.columns for name in c.facts))


def bad_rows(report: Json) -> list[tuple[Row, int]]:
    """Where the cases that count against a report are, and how many."""
    return sorted(Counter(subject_of(c) for c in report["cases"] if c["problem"]).items())


def _data(m: Matrix) -> Json:
    """What the script shows: cases once per column, cells as indices into them."""
    columns = {
        c.slug: {
            "name": c.last["backend"],
            "emulated": c.last["emulated"],
            "device": c.last["device"],
            "cases": [[case[f] for f in CASE_FIELDS] for case in c.cases],
            "perf": [[case[f] for f in PERF_FIELDS] for case in c.timed],
            "ceilings": [p["ceilings"] for p in c.perf],
        }
        for c in m.columns
    }
    cells = {
        cell_id(row, c): {"row": row.title, "column": c.slug, "cases": cell.cases, "perf": cell.perf}
        for row in m.rows
        if row.counted
        for c in m.columns
        for cell in (m.cell(row, c),)
    }
    return {
        "k": K,
        "symbols": {s: symbol for s, (symbol, _) in STATES.items()},
        "words": STATUSES,
        "columns": columns,
        "cells": cells,
    }
