"""`conform matrix REPORT.json... [-o DIR]` and `conform families REPORT.json... [-o FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyradix_conformance.matrix import families
from polyradix_conformance.matrix.evidence import MatrixError, read
from polyradix_conformance.matrix.markdown import markdown
from polyradix_conformance.matrix.model import Matrix, build
from polyradix_conformance.matrix.page import page
from polyradix_conformance.report import today

TEXT = "write the table of backends, matrix.md and matrix.html, from their reports"
FAMILIES = "write the table of model families by backends, from their reports"


def add_parser(subparsers: Any) -> None:
    """Adds both commands to what `add_subparsers` gave; their `func` returns 0, or 2 when nothing was written."""
    parser = subparsers.add_parser("matrix", help=TEXT, description=TEXT)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="REPORT.json", help="from `conform run -o` and `conform perf -o`"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="where matrix.md and matrix.html go"
    )
    parser.set_defaults(func=_main)
    parser = subparsers.add_parser("families", help=FAMILIES, description=FAMILIES)
    parser.add_argument("files", nargs="+", type=Path, metavar="REPORT.json", help="from `conform run -o`")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="Markdown; printed if not given")
    parser.set_defaults(func=_families)


def _main(args: argparse.Namespace) -> int:
    def write(matrix: Matrix) -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, text in (("matrix.md", markdown(matrix)), ("matrix.html", page(matrix))):
            (args.output / name).write_text(text, encoding="utf-8")
            print(args.output / name)

    return _from_reports("matrix", args.files, write)


def _families(args: argparse.Namespace) -> int:
    def write(matrix: Matrix) -> None:
        if args.output is None:
            print(families.page(matrix), end="")
        else:
            args.output.write_text(families.page(matrix), encoding="utf-8")

    return _from_reports("families", args.files, write)


def _from_reports(command: str, files: list[Path], write: Callable[[Matrix], None]) -> int:
    try:
        write(build([(p.name, read(p)) for p in files], today()))
    except (MatrixError, OSError) as e:
        print(f"conform {command}: {e}", file=sys.stderr)
        return 2
    return 0
