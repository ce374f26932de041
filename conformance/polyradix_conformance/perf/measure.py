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
WARM = 2  # launches before the timing
NOISY = 0.5  # of a time: a doubt that is remarked on
STEADY = 0.05  # of a time: a doubt that does not matter
IN_FLIGHT = 64  # launches of a chain at most


@dataclass(frozen=True)
class Timing:
    """Seconds per call: `median`, and `sure`, in which it was certainly done: the median where the chains agree, else
    the quickest chain with all that is around the call, which noise can only lengthen."""

    median: float
    sure: float
    remark: str = ""


@dataclass(frozen=True)
class Measured:
    """`timing` is None for what was not timed."""

    case: PerfCase
    status: Status
    timing: Timing | None = None
    detail: str = ""

    def rate(self, amount: int) -> float:
        """Bytes or operations per second, in units of 1e9; 0 for what was not timed or is wrong."""
        return amount / self.timing.sure / 1e9 if self.timing and self.status == "pass" else 0.0


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
    many = [turn[-1][0] for turn in spent]
    few = [turn[0][0] for turn in spent] if subject.few else [0.0]
    return _timing(many, few, times * subject.calls), spent[-1][-1][1]


def _timing(many: list[float], few: list[float], calls: int) -> Timing:
    """From the seconds of chains, of which `many` made so many calls more than `few`."""
    whole, quickest = median(many), min(many)
    extra, doubt = whole - median(few), whole - quickest + median(few) - min(few)
    if extra <= 0:
        remark = "too quick to be told from the step around it, which is counted too"
        return Timing(whole / calls, quickest / calls, remark)
    remark = f"noisy: off by up to {doubt / extra:.0%}" if doubt > NOISY * extra else ""
    return Timing(extra / calls, (extra if doubt <= STEADY * extra else quickest) / calls, remark)


def _lasts(chain: Chain, times: int) -> tuple[float, Arr]:
    start = time.perf_counter()
    out = chain(times)
    return time.perf_counter() - start, out
