"""Reads reports and perf files, and refuses what is not evidence: edited, partial, or of another schema."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from polyradix_conformance.report import load, seal

PERF_SCHEMA = Path(__file__).parent.parent / "perf" / "perf-1.json"


class MatrixError(ValueError):
    """A file that cannot count, and why."""


def read(path: Path) -> dict[str, Any]:
    """One report or perf file. Raises MatrixError."""
    try:
        data = _perf(path) or load(path)
        datetime.fromisoformat(data["date"])
        if data["partial"]:
            raise MatrixError("partial is true; expected a whole run, for a cell counts all of its cases")
    except ValueError as e:
        raise MatrixError(f"{path}: {e}") from e
    return data


def _perf(path: Path) -> dict[str, Any] | None:
    """None for any other file, which `load` then judges."""
    schema = json.loads(PERF_SCHEMA.read_text())
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("schema") != schema["properties"]["schema"]["const"]:
        return None
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if error is not None:
        raise MatrixError(f"{error.json_path.removeprefix('$.')}: {error.message[:200]}")
    if data["digest"] != seal(data)["digest"]:
        raise MatrixError("the digest does not match: the file was changed after it was written")
    return data
