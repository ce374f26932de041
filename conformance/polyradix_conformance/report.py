"""The report of a run: made, sealed with a digest, written whole or not at all, and read back; the file of `conform
perf` likewise. Their schemas are in schema/. Knows no backend.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]

from polyradix.backend.protocol import PROTOCOL_VERSION
from polyradix.backend.registry import GROUP
from polyradix_conformance import mustpass

if TYPE_CHECKING:
    from polyradix_conformance.cases import Case
    from polyradix_conformance.runner import Result
    from polyradix_conformance.supervisor import Claims, Job
    from polyradix_conformance.waivers import Waiver

SCHEMA, PERF = "polyradix-conformance-report-1", "polyradix-conformance-perf-1"

Report = dict[str, Any]


class ReportError(ValueError):
    """A file that is no report; the message says why."""


def build(
    job: Job,
    claims: Claims,
    profile: str,
    partial: bool,
    cases: Sequence[Case],
    results: Sequence[Result],
    waivers: Mapping[str, Waiver],
    seconds: float,
) -> Report:
    """A sealed report of `results`, those of `cases`. A waiver that holds turns a fail or error into `waived`; any
    other stays with its case, where it is a problem."""
    now = datetime.now(UTC)

    def entry(case: Case, result: Result) -> dict[str, Any]:
        waiver = waivers.get(case.id)
        holds = waiver is not None and waiver.why_not(job.backend, claims.device, now.date()) is None
        return {
            "id": case.id,
            "status": "waived" if holds and result.status in ("fail", "error") else result.status,
            "seconds": result.seconds,
            "detail": result.detail,
            "error_to_floor": result.error_to_floor,
            "needs": {
                "dtype": case.needs.dtype,
                "head_dim": case.needs.head_dim,
                "features": sorted(case.needs.features),
                "tp": case.needs.tp,
                "page_size": case.page_size,
            },
            "waiver": waiver and waiver.json(),
        }

    entries = [entry(c, r) for c, r in zip(cases, results, strict=True)]
    return seal(
        {
            **head(SCHEMA, now),
            "profile": profile,
            "mustpass": mustpass.name(profile),
            "partial": partial,
            "backend": job.backend,
            "options": dict(job.options),
            "emulated": claims.emulated,
            "device": claims.device,
            "notes": claims.notes,
            "caps": claims.caps,
            "machine": machine(job.backend),
            "seconds": round(seconds, 3),
            "counts": dict(Counter(e["status"] for e in entries)),
            "cases": entries,
        }
    )


def head(schema: str, now: datetime) -> Report:
    """What every file begins with; `now` in UTC."""
    return {
        "schema": schema,
        "suite": version("polyradix-conformance"),
        "protocol": list(PROTOCOL_VERSION),
        "date": now.isoformat(timespec="seconds"),
    }


def today() -> date:
    """In UTC, as every date of a report."""
    return datetime.now(UTC).date()


def machine(backend: str) -> dict[str, Any]:
    """Python, platform, and the versions of the suite, of the backend's package and of what that one requires."""
    found = {name: version(name) for name in ("polyradix", "polyradix-conformance", "numpy", "ml-dtypes")}
    names = [p.dist.name for p in entry_points(group=GROUP, name=backend) if p.dist]
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # needed elsewhere, on another platform
            continue
        found[name] = package.version
        names += [m[0] for r in package.requires or () if "extra ==" not in r and (m := re.match(r"[\w.-]+", r))]
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": found}


def seal(report: Report) -> Report:
    """With its digest. Raises ValueError for a value that JSON lacks, such as NaN."""
    return {**report, "digest": _digest(report)}


def _digest(report: Report) -> str:
    rest = {k: v for k, v in report.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(report: Report, path: Path) -> None:
    """Whole or not at all."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "w") as f:
            f.write(json.dumps(report, indent=1, allow_nan=False) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, schemas: Sequence[str] = (SCHEMA,)) -> Report:
    """A file of one of `schemas`, whose content and digest are right. Raises ReportError."""
    report = _read(path)
    found = report.get("schema") if isinstance(report, dict) else type(report).__name__
    if not isinstance(report, dict) or found not in schemas:
        raise ReportError(f"schema is {found!r}; expected {' or '.join(map(repr, schemas))}")
    error = jsonschema.exceptions.best_match(_validator(found).iter_errors(report))
    if error is not None:
        raise ReportError(f"{error.json_path.removeprefix('$.')}: {error.message[:200]}")
    if report["digest"] != _digest(report):
        raise ReportError("the digest does not match: the report was changed after it was written")
    return report


def _read(path: Path) -> Any:
    try:
        text = path.read_bytes().decode()
    except OSError as e:
        raise ReportError(f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ReportError("is not text; expected JSON") from e
    if not text.strip():
        raise ReportError("is empty; expected JSON")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
    except ReportError:
        raise
    except json.JSONDecodeError as e:
        where = "ends too early" if e.pos >= len(text.rstrip()) else f"is not JSON: {e.msg} in line {e.lineno}"
        raise ReportError(where) from e
    except (ValueError, RecursionError) as e:
        raise ReportError(f"is not JSON: {e}") from e


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
    if repeated:
        raise ReportError(f"key {repeated[0]!r} is used twice in one object")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ReportError(f"holds {constant}, which is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if value - value == 0 else _refuse(text)


@cache
def _validator(schema_name: str) -> Any:
    name = schema_name.removeprefix("polyradix-conformance-")
    schema = json.loads((Path(__file__).parent / "schema" / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema)
