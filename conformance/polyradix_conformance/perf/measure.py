"""Times one case, then checks what the timed step gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
WARM = 2  # launches before the timing
NOISE = 1.5  # times the quickest, from which a median is marked
IN_FLIGHT = 64  # launches of a chain at most


@dataclass(frozen=True)
class Timing:
    """Seconds per call: `median`, and those of the quickest chains as `best`."""

    median: float
    best: float
    remark: str = ""


@dataclass(frozen=True)
class Measured:
    """`timing` is None for what was not timed."""

    case: PerfCase
    status: Status
    timing: Timing | None = None
    detail: str = ""

    def best(self, amount: int) -> float:
        """Bytes or operations per second, in units of 1e9; 0 for what was not timed or is wrong."""
        return amount / self.timing.best / 1e9 if self.timing and self.status == "pass" else 0.0


def measure(backend: Backend, dtype: str, case: PerfCase, seconds: float) -> Measured:
    """`seconds` is about how long the timing goes on, building and checking not counted."""
    reasons = validate(Needs(dtype, case.head_dim, frozenset()), backend.caps)
    if reasons:
        return Measured(case, "unsupported", detail="; ".join(map(str, reasons)))
    timing = None
    try:
        subject = case.build(Rig(backend, dtype))
        timing, last = timed(subject, seconds)
        subject.check(last)
    except Unsupported as e:
        return Measured(case, "unsupported", detail=str(e))
    except Mismatch as e:
        return Measured(case, "fail", timing, str(e))
    except Exception as e:
        return Measured(case, "error", timing, f"{type(e).__name__}: {e}")
    return Measured(case, "pass", timing, timing.remark)


def timed(subject: Subject, seconds: float) -> tuple[Timing, Arr]:
    """Chains of `few` and of `many` in turn, and the last result."""
    chains = [subject.many] if subject.few is None else [subject.few, subject.many]
    for chain in chains:
        chain(WARM)
    once = sum(_lasts(chain, 1)[0] for chain in chains)
    times = max(1, min(IN_FLIGHT, int(seconds / AIM / once)))
    spent = [[_lasts(chain, times) for chain in chains] for _ in range(max(CHAINS, int(seconds / (times * once))))]

    def extra(pick: Callable[[Iterable[float]], float]) -> float:
        without = pick(turn[0][0] for turn in spent) if subject.few else 0.0
        return (pick(turn[-1][0] for turn in spent) - without) / (times * subject.calls)

    middle, best, last = extra(median), extra(min), spent[-1][-1][1]
    if middle <= 0 or best <= 0:
        whole = median(turn[-1][0] for turn in spent) / (times * subject.calls)
        return Timing(whole, whole, "too quick to be told from the step around it, which is counted too"), last
    steady = 1 / NOISE < middle / best < NOISE
    return Timing(middle, best, "" if steady else f"noisy: the quickest chains say {best * 1e6:.1f} us"), last


def _lasts(chain: Chain, times: int) -> tuple[float, Arr]:
    start = time.perf_counter()
    out = chain(times)
    return time.perf_counter() - start, out
