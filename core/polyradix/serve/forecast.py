"""How fast a model can be at best on a device of known bandwidth and operations a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from polyradix.graph.cost import Batch, Cost

NOTE = "elementwise operations and what ranks tell each other are not counted"


@dataclass(frozen=True)
class Ceilings:
    """What one device does at best: 1e9 bytes read and 1e9 operations a second. `source` is who said so."""

    read_gb_s: float
    gflop_s: float
    source: str

    def times(self, cost: Cost) -> tuple[float, float]:
        """The seconds that its bytes take, and its operations."""
        return cost.bytes / self.read_gb_s / 1e9, cost.flops / self.gflop_s / 1e9


def find(read: float | None, flops: float | None, file: Path | None, dtype: str) -> Ceilings | None:
    """As given, and what is not, from `file`, which `conform perf` wrote; None without any. Raises ValueError for one
    that is neither given nor measured."""
    if read is None and flops is None and file is None:
        return None
    held: Any = json.loads(file.read_text())["ceilings"] if file else {"read_gb_s": 0.0, "gflop_s": {}}
    read_gb_s, gflop_s = read or held["read_gb_s"], flops or held["gflop_s"].get(dtype, 0.0)
    for name, value in (("peak_bandwidth", read_gb_s), ("peak_flops", gflop_s)):
        if value <= 0:
            raise ValueError(f"{name} is {value} for {dtype}; expected a number above 0, given or measured")
    who = ["given"] * bool(read or flops) + [str(file)] * (not (read and flops))
    return Ceilings(read_gb_s, gflop_s, " and ".join(who))


def forecast(
    cost: Callable[[Batch], Cost], context: int, seqs: int, budget: int, ceilings: Ceilings | None
) -> list[dict[str, Any]]:
    """Decodes of one and of `seqs` sequences that hold `context` tokens, and the prefill of such a prompt in steps of
    `budget`: bytes and operations, and with ceilings the least seconds and the most tokens a second."""
    stops = [*range(budget, context, budget), context]
    chunks = [Batch(1, stop - start, stop) for start, stop in pairwise([0, *stops])]
    rows = [("decode", [Batch(n, 1, context)]) for n in sorted({1, seqs})] + [("prefill", chunks)]
    return [_row(name, batches, [cost(b) for b in batches], ceilings) for name, batches in rows]


def _row(step: str, batches: list[Batch], costs: list[Cost], ceilings: Ceilings | None) -> dict[str, Any]:
    tokens = sum(b.seqs * b.new for b in batches)
    moved, flops = sum(c.bytes for c in costs), sum(c.flops for c in costs)
    out = {"step": step, "seqs": batches[0].seqs, "tokens": tokens, "bytes": moved, "flops": flops}
    if ceilings is None:
        return out
    seconds = sum(max(ceilings.times(c)) for c in costs)
    bound = max(zip(ceilings.times(Cost(moved, flops)), ("memory", "compute"), strict=True))[1]
    return {**out, "seconds": seconds, "tokens_per_s": tokens / seconds, "bound": bound}
