"""Runs cases on one backend. A case whose needs are not claimed runs too: it must be declined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from traceback import extract_tb
from typing import Literal

from polyradix.backend.capabilities import Unsupported, validate
from polyradix.backend.protocol import Backend
from polyradix_conformance.cases import Case
from polyradix_conformance.rig import Mismatch, Rig

Status = Literal["pass", "fail", "error", "unsupported", "waived", "not_run"]
DETAIL = 2000  # characters of a detail that are kept


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
    start, worst, missing = time.perf_counter(), 0.0, ""
    status: Status
    try:
        missing = "; ".join(map(str, validate(case.needs, open(1).caps, case.page_size)))
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
        status, detail = "error", f"{type(e).__name__}: {e} [{_where(e)}]"
    shown = float(worst) if 0 < worst < float("inf") else None
    return Result(case.id, status, round(time.perf_counter() - start, 4), detail[:DETAIL], shown)


def _where(e: Exception) -> str:
    frame = extract_tb(e.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def run(cases: Iterable[Case], make: Opener, seen: Callable[[Result], None] = lambda r: None) -> list[Result]:
    """All cases on one backend, in order; `seen` is told of each result. A number of ranks is opened once."""
    open, out = cache(make), []
    for case in cases:
        out.append(run_case(case, open))
        seen(out[-1])
    return out
