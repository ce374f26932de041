"""Reads reports and perf files, and refuses what is not evidence: edited, partial, or of another schema."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from polyradix_conformance.report import PERF, SCHEMA, Report, load


class MatrixError(ValueError):
    """A file that cannot count, and why."""


def read(path: Path) -> Report:
    """One report or perf file. Raises MatrixError."""
    try:
        data = load(path, (SCHEMA, PERF))
        datetime.fromisoformat(data["date"])
        if data["partial"]:
            raise MatrixError("partial is true; expected a whole run, for a cell counts all of its cases")
    except ValueError as e:
        raise MatrixError(f"{path}: {e}") from e
    return data
