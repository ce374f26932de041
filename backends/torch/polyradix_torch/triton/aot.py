"""Compiles kernels as serving launches them, for chips that need not be here.

Launchers run on tensors without memory ("meta"); what they launch is compiled, never run. A backend's package gives
CHIPS, and judges what was made for them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from polyradix_torch.triton.launches import Launch

SECONDS = 60.0  # for one kernel


@dataclass(frozen=True)
class Chip:
    """`shared` is the bytes of shared memory (LDS) that a block may have. `judge` takes a triton CompiledKernel and
    gives figures to print, and why the kernel would not run, or not run well."""

    target: GPUTarget
    shared: int
    judge: Callable[[Any], tuple[dict[str, int], list[str]]]


@dataclass(frozen=True)
class Built:
    """One kernel on one chip."""

    chip: str
    launch: str
    kernel: str
    seconds: float
    figures: dict[str, int]
    objections: list[str]


def compile_all(name: str, chip: Chip, todo: Iterator[Launch], seconds: float) -> Iterator[Built]:
    """Each kernel once. Ends the process when one takes more than `seconds`."""
    driver = SimpleNamespace(
        get_current_target=lambda: chip.target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": chip.shared}),
    )
    triton.runtime.driver.set_active(driver)
    made: dict[str, tuple[str, Any, float]] = {}
    seen: set[str] = set()
    run = JITFunction.run

    def build(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        faulthandler.cancel_dump_traceback_later()
        made[kernel.hash] = self.__name__, kernel, time.perf_counter() - start

    JITFunction.run = build
    for launch, call in todo:
        print(f"{name} {launch}", file=sys.stderr, flush=True)
        call()
        for kernel_name, kernel, took in (made[key] for key in made if key not in seen):
            figures, objections = chip.judge(kernel)
            taken = kernel.metadata.shared
            if taken > chip.shared:
                objections.append(f"takes {taken} bytes of shared memory; a block may have {chip.shared}")
            yield Built(name, launch, kernel_name, round(took, 2), figures | {"shared": taken}, objections)
        seen |= made.keys()
        made.clear()


def worker(
    chips: str, chip: str, source: str, seconds: float = SECONDS, folder: Path | None = None
) -> tuple[list[Built], str]:
    """Compiles what `source` (module:function) gives for CHIPS[chip] of module `chips`, in a process of its own, whose
    current folder is `folder`: what it built, and why it failed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:  # a cache of its own, so that every kernel is compiled
        done = subprocess.run(
            [sys.executable, "-m", __name__, chips, chip, source, str(seconds)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment | {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"},
        )
    built = [Built(**json.loads(line)) for line in done.stdout.splitlines()]
    return built, f"{chip}: exit status {done.returncode}\n{done.stderr[-8000:]}" if done.returncode else ""


def work(chips: str, chip: str, source: str, seconds: str) -> None:
    module, function = source.split(":")
    todo = getattr(import_module(module), function)()
    for built in compile_all(chip, import_module(chips).CHIPS[chip], todo, float(seconds)):
        print(json.dumps(asdict(built)), flush=True)


def table(built: list[Built]) -> str:
    """One line for each, their figures below the names of those."""
    names = list(built[0].figures) if built else []
    lines = [f"{'chip':7}{'kernel':10}{'launch':34}" + "".join(f"{n:>10}" for n in names) + f"{'seconds':>9}"]
    lines += [
        f"{b.chip:7}{b.kernel:10}{b.launch:34}" + "".join(f"{b.figures[n]:10}" for n in names) + f"{b.seconds:9.2f}"
        for b in built
    ]
    return "\n".join(lines)


def report(chips: str, names: list[str], source: str) -> int:
    """Prints what each kernel takes on the chips so named, two at a time, and what is wrong. 1 if anything is."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda chip: worker(chips, chip, source), names))
    built = [b for made, _ in done for b in made]
    print(table(built))
    wrong = [f"{b.chip} {b.launch} {b.kernel}: {o}" for b in built for o in b.objections]
    wrong += [why for _, why in done if why]
    print("\n".join(wrong) or "nothing to object to")
    return 1 if wrong else 0


if __name__ == "__main__":
    work(*sys.argv[1:])
