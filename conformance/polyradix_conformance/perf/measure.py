"""Times one case, then checks what the timed step gave."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

from polyradix.backend.capabilities import Needs, Unsupported, validate
from polyradix.backend.protocol import Backend
from polyradix_conformance.oracle import Arr
from polyradix_conformance.perf.cases import PerfCase
from polyradix_conformance.perf.program import Chain, Subject
from polyradix_conformance.rig import Mismatch, Rig

Status = Literal["pass", "fail", "error", "unsupported"]

CHAINS = 5  # at least
AIM = 15  # if there is time
WARM = 3  # launches before the timing
IN_FLIGHT = 64  # launches of a chain at most


@dataclass(frozen=True)
class Measured:
    """`seconds` per call, None when it was not timed."""

    case: PerfCase
    status: Status
    seconds: float | None = None
    detail: str = ""

    def rate(self, amount: int) -> float:
        """Bytes or operations per second, in units of 1e9; 0 for what was not timed or is wrong."""
        return amount / self.seconds / 1e9 if self.seconds and self.status == "pass" else 0.0


def measure(backend: Backend, dtype: str, case: PerfCase, seconds: float) -> Measured:
    """`seconds` is about how long the timing goes on, building and checking not counted."""
    reasons = validate(Needs(dtype, case.head_dim, frozenset()), backend.caps)
    if reasons:
        return Measured(case, "unsupported", detail="; ".join(map(str, reasons)))
    per_call, detail = None, ""
    try:
        subject = case.build(Rig(backend, dtype))
        per_call, detail, last = timed(subject, seconds)
        subject.check(last)
    except Unsupported as e:
        return Measured(case, "unsupported", detail=str(e))
    except Mismatch as e:
        return Measured(case, "fail", per_call, str(e))
    except Exception as e:
        return Measured(case, "error", per_call, f"{type(e).__name__}: {e}")
    return Measured(case, "pass", per_call, detail)


def timed(subject: Subject, seconds: float) -> tuple[float, str, Arr]:
    """Seconds per call, from the medians of chains of `many` and of `few` in turn; a remark; and the last result."""
    chains = [subject.many] if subject.few is None else [subject.few, subject.many]
    for chain in chains:
        chain(WARM)
    once = sum(_lasts(chain, 1)[0] for chain in chains)
    times = max(1, min(IN_FLIGHT, int(seconds / AIM / once)))
    spent = [[_lasts(chain, times) for chain in chains] for _ in range(max(CHAINS, int(seconds / (times * once))))]
    whole = median(turn[-1][0] for turn in spent)
    extra = whole - (median(turn[0][0] for turn in spent) if subject.few else 0.0)
    remark = "" if extra > 0 else "too quick to be told from the step around it, which is counted too"
    return (extra if extra > 0 else whole) / (times * subject.calls), remark, spent[-1][-1][1]


def _lasts(chain: Chain, times: int) -> tuple[float, Arr]:
    start = time.perf_counter()
    out = chain(times)
    return time.perf_counter() - start, out
