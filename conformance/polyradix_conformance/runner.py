"""Runs cases on one backend and reports. A case whose needs are not claimed runs too: it must be declined."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from polyradix.backend.capabilities import Unsupported, validate
from polyradix.backend.protocol import PROTOCOL_VERSION, Backend
from polyradix_conformance.cases import Case
from polyradix_conformance.rig import Mismatch, Rig

Status = Literal["pass", "fail", "error", "unsupported"]


@dataclass(frozen=True)
class Result:
    """`error_to_floor` is the largest seen, None where nothing was compared by tolerance."""

    id: str
    status: Status
    seconds: float
    detail: str = ""
    error_to_floor: float | None = None

    @property
    def good(self) -> bool:
        """Right, or rightly declined."""
        return self.status in ("pass", "unsupported")


Opener = Callable[[int], Backend]  # a backend split over so many tensor-parallel ranks


def run_case(case: Case, open: Opener) -> Result:
    """`open(1)` is asked for every case, `open(n)` for those that want n ranks."""
    start, worst = time.perf_counter(), 0.0
    missing = "; ".join(map(str, validate(case.needs, open(1).caps, case.page_size)))
    status: Status
    try:
        rig = Rig(open(case.needs.tp), case.needs.dtype)
        try:
            case.run(rig)
        finally:
            worst = rig.worst
        status, detail = ("fail", f"answered instead of raising Unsupported: {missing}") if missing else ("pass", "")
    except Unsupported as e:
        status, detail = ("unsupported", missing) if missing else ("fail", f"claimed, and declined: {e}")
    except Mismatch as e:
        status, detail = "fail", f"not claimed ({missing}), and answered wrongly: {e}" if missing else str(e)
    except Exception as e:
        status, detail = "error", f"{type(e).__name__}: {e}"
    shown = worst if 0 < worst < float("inf") else None
    return Result(case.id, status, round(time.perf_counter() - start, 4), detail, shown)


def run(cases: Iterable[Case], make: Opener, seen: Callable[[Result], None] = lambda r: None) -> list[Result]:
    """All cases on one backend, in order; `seen` is told of each result. A number of ranks is opened once."""
    open, out = cache(make), []
    for case in cases:
        out.append(run_case(case, open))
        seen(out[-1])
    return out


def report(
    backend: Backend, name: str, options: dict[str, Any], profile: str, partial: bool, results: list[Result]
) -> dict[str, Any]:
    """What `conform run -o` writes."""
    return {
        "suite": version("polyradix-conformance"),
        "protocol": list(PROTOCOL_VERSION),
        "profile": profile,
        "partial": partial,
        "backend": name,
        "options": options,
        "device": backend.caps.device,
        "emulated": backend.caps.emulated,
        "notes": list(backend.caps.notes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": dict(Counter(r.status for r in results)),
        "cases": [asdict(r) for r in results],
    }


def verdict(results: list[Result]) -> str | None:
    """Why these results do not count as conformant, None when they do."""
    if not any(r.status == "pass" for r in results):
        return "no case passed" if results else "no case was run"
    bad = sum(not r.good for r in results)
    return f"{bad} of {len(results)} cases failed" if bad else None
