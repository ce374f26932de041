"""`conform matrix REPORT.json... [-o DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from polyradix_conformance.matrix.evidence import MatrixError, read
from polyradix_conformance.matrix.markdown import markdown
from polyradix_conformance.matrix.model import build
from polyradix_conformance.matrix.page import page
from polyradix_conformance.report import today

TEXT = "write the table of backends, matrix.md and matrix.html, from their reports"


def add_parser(subparsers: Any) -> None:
    """Adds the command to what `add_subparsers` gave; its `func` returns 0, or 2 when nothing was written."""
    parser = subparsers.add_parser("matrix", help=TEXT, description=TEXT)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="REPORT.json", help="from `conform run -o` and `conform perf -o`"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="where matrix.md and matrix.html go"
    )
    parser.set_defaults(func=_main)


def _main(args: argparse.Namespace) -> int:
    try:
        matrix = build([(p.name, read(p)) for p in args.files], today())
        args.output.mkdir(parents=True, exist_ok=True)
        for name, text in (("matrix.md", markdown(matrix)), ("matrix.html", page(matrix))):
            (args.output / name).write_text(text, encoding="utf-8")
            print(args.output / name)
    except (MatrixError, OSError) as e:
        print(f"conform matrix: {e}", file=sys.stderr)
        return 2
    return 0
