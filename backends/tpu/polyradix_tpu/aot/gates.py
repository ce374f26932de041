"""Compiles a program and judges what came out."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from polyradix_tpu.aot.chips import Chip

COLLECTIVES = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


@dataclass(frozen=True)
class Program:
    """What to compile, and what must come out, in bytes of one device. `lower` gives a jax.stages.Lowered."""

    name: str
    mesh: Any
    lower: Callable[[], Any]
    alias: int  # updated in place
    temp: int | None = None  # temporaries stay below
    collectives: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Row:
    """Of the table. `failures` begin with the gate's name."""

    chip: str
    program: str
    seconds: float = 0.0
    arguments: int = 0
    alias: int = 0
    temp: int = 0
    share: float = 0.0  # of HBM
    collectives: Mapping[str, int] | None = None
    bundles: float | None = None  # a token
    budget: float | None = None  # cycles in which memory delivers a token
    failures: tuple[str, ...] = ()


def build(chip: Chip, program: Program) -> Row:
    """Compiles, and fails no louder than in the row."""
    start = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):  # tells Pallas the chip
            compiled = program.lower().compile()
    except Exception as error:
        gate = "HBM fits" if "on HBM" in str(error) else "compiles"
        message = f"{gate}: {type(error).__name__}: {error}".strip().splitlines()[0]
        return Row(chip.name, program.name, time.perf_counter() - start, failures=(message,))
    return judge(chip, program, compiled, time.perf_counter() - start)


def judge(chip: Chip, program: Program, compiled: Any, seconds: float) -> Row:
    memory = compiled.memory_analysis()
    alias, temp = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - alias + temp
    used += memory.generated_code_size_in_bytes
    said = dict(Counter(re.findall(COLLECTIVES, compiled.as_text())))
    failures = []
    if used > chip.hbm:
        failures.append(f"HBM fits: {used:,} bytes of {chip.hbm:,}")
    if alias != program.alias:
        failures.append(f"alias: {alias:,} bytes are updated in place; expected {program.alias:,}")
    if program.temp is not None and temp >= program.temp:
        failures.append(f"temp: {temp:,} bytes of temporaries; expected fewer than {program.temp:,}")
    if program.collectives is not None and said != program.collectives:
        failures.append(f"collectives: {said}; expected {dict(program.collectives)}")
    arguments, share = memory.argument_size_in_bytes, used / chip.hbm
    return Row(chip.name, program.name, seconds, arguments, alias, temp, share, said, failures=tuple(failures))


def table(rows: list[Row]) -> str:
    """For people; GB are of 10^9 bytes and of one device."""
    head = f"{'chip':6} {'program':50} {'s':>5} {'args GB':>7} {'alias GB':>8} {'temp GB':>7} {'HBM':>4} "
    lines = [head + f"{'collectives':28} {'bundles':>11} verdict"]
    for r in rows:
        said = " ".join(f"{n} {name}" for name, n in sorted((r.collectives or {}).items()))
        sizes = f"{r.arguments / 1e9:7.3f} {r.alias / 1e9:8.3f} {r.temp / 1e9:7.3f} {r.share:4.0%}"
        bundles = "" if r.bundles is None else f"{r.bundles:.2f} of {r.budget:.2f}"
        verdict = "FAILS " + ", ".join(f.split(":")[0] for f in r.failures) if r.failures else "ok"
        lines.append(f"{r.chip:6} {r.program:50} {r.seconds:5.1f} {sizes} {said:28} {bundles:>11} {verdict}")
    lines += [f"FAILED {r.chip}, {r.program}: {failure}" for r in rows for failure in r.failures]
    return "\n".join(lines)
