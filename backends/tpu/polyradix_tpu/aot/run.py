"""From what was asked for to the rows of the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from polyradix.backend.protocol import Heads
from polyradix.graph.spec import ModelSpec
from polyradix_tpu.aot.bundles import budget, decode_bundles, too_slow
from polyradix_tpu.aot.chips import CHIPS, Chip
from polyradix_tpu.aot.gates import Row, build
from polyradix_tpu.aot.programs import read_model, samples, steps
from polyradix_tpu.kernels import choose


def run(chip: str, model: str, tp: int, kernels: str) -> list[Row]:
    """Raises ValueError for a model, or a tp, that cannot be compiled."""
    spec = read_model(model)
    if uneven := spec.uneven_split(tp):
        raise ValueError(uneven)
    rows = []
    for c in CHIPS.values() if chip == "all" else [CHIPS[chip]]:
        for row in _rows(c, spec, tp, kernels):
            print(f"{row.chip}, {row.program}: {row.seconds:.1f} s", file=sys.stderr)
            rows.append(row)
    return rows


def _rows(chip: Chip, spec: ModelSpec, tp: int, kernels: str) -> Iterator[Row]:
    try:
        yield from (build(chip, program) for program in steps(chip, spec, tp, choose(kernels, on_tpu=True)))
    except MemoryError as error:
        yield Row(chip.name, "step", failures=(f"HBM fits: {error}",))
    if kernels != "xla":
        yield _attention(chip, Heads(spec.heads.q // tp, spec.heads.kv // tp, spec.heads.dim))
        yield from (build(chip, program) for program in samples(chip))


def _attention(chip: Chip, heads: Heads) -> Row:
    name, start = "decode attention of a rank", time.perf_counter()
    try:
        bundles = decode_bundles(chip, heads)
    except RuntimeError as error:
        return Row(chip.name, name, failures=(f"compiles: {error}",))
    seconds, failures = time.perf_counter() - start, too_slow(chip, heads, bundles)
    return Row(chip.name, name, seconds, bundles=bundles, budget=budget(chip, heads), failures=failures)
