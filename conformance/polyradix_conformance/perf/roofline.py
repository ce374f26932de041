"""What the device was seen to do at best, and each case's share of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from polyradix_conformance.perf.cost import Cost
from polyradix_conformance.perf.measure import Measured

TOLERATED = 1.05  # a larger share says that the ceiling was measured too low


@dataclass(frozen=True)
class Ceilings:
    """1e9 bytes and 1e9 operations per second, 0 when unknown; how each was found."""

    read: float
    flops: float
    how: tuple[str, str]

    def seconds(self, cost: Cost) -> tuple[float, Literal["memory", "compute"]]:
        """The least time that a call can take, and what bounds it."""
        memory = cost.bytes / self.read / 1e9 if self.read else 0.0
        compute = cost.flops / self.flops / 1e9 if self.flops else 0.0
        return (compute, "compute") if compute > memory else (memory, "memory")


def find(measured: Iterable[Measured], read: float | None, flops: float | None) -> Ceilings:
    """From what the probes surely did, or as given. What was measured is raised to what any other case did more than
    5 % better; only cases whose data overflow caches say something about memory."""
    done = list(measured)
    memory = [(m.rate(m.case.cost.bytes), m) for m in done if m.case.streams]
    compute = [(m.rate(m.case.cost.flops), m) for m in done]
    a, b = _best(memory, "read", read), _best(compute, "compute", flops)
    return Ceilings(a[0], b[0], (f"reads: {a[1]}", f"operations: {b[1]}"))


def _best(rates: list[tuple[float, Measured]], probe: str, given: float | None) -> tuple[float, str]:
    best = max(rates, key=lambda r: r[0], default=None)
    if given is not None:
        over = best is not None and best[0] > given * TOLERATED
        return given, "given" + (f", and exceeded by {best[1].case.id} ({best[0]:.4g})" if best and over else "")
    probes = [(rate, m) for rate, m in rates if m.case.probe == probe and rate > 0]
    if best is None or best[0] == 0:
        return 0.0, "unknown, nothing was measured"
    rate, from_ = max(probes, key=lambda r: r[0], default=(0.0, best[1]))
    if best[0] > rate * TOLERATED:
        return best[0], f"raised from {rate:.4g}, the best probe, to that of {best[1].case.id}"
    return rate, f"probe {from_.case.id}"
