"""Compiles every kernel as serving launches it, for chips that need not be here, and prints what each one takes.

    python aot.py [sm_80 sm_90 sm_100 sm_120]

The launchers run on tensors without memory; what they launch is compiled, never run. Exits with 1 when a kernel does
not compile in time, spills registers, or wants more shared memory than a block of the chip may have.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}  # bytes a block may have
SECONDS = 60.0  # for one kernel
Launch = tuple[str, Callable[[], Any]]


@dataclass(frozen=True)
class Built:
    """One kernel on one chip. `stack` is bytes of local memory a thread: spilled registers."""

    chip: str
    launch: str
    kernel: str
    registers: int
    stack: int
    shared: int
    seconds: float

    @property
    def objections(self) -> list[str]:
        """Why it would not run, or not run well."""
        out = [f"spills {self.stack} bytes a thread"] if self.stack else []
        if self.shared > SHARED[self.chip]:
            out.append(f"takes {self.shared} bytes of shared memory; a block may have {SHARED[self.chip]}")
        return [f"{self.chip} {self.launch} {self.kernel}: {o}" for o in out]


def launches() -> Iterator[Launch]:
    """Llama-like shapes in bfloat16, and what float32 conformance adds: the widest heads."""
    import torch

    from polyradix_torch.triton import rows, skinny
    from polyradix_torch.triton.skinny import Tile

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    x, cache = empty(64, 4096), (empty(256, 16, 8, 128), empty(256, 16, 8, 128))
    q, k, v = empty(64, 48, 128).split([32, 8, 8], dim=1)
    weight, table = empty(4096, dtype=torch.float32), empty(8192, 128, dtype=torch.float32)
    yield "width 4096", lambda: rows.rms_norm(x, weight, 1e-5)
    yield "width 4096", lambda: rows.add_rms_norm(x, x, weight, 1e-5)
    yield "width 16384", lambda: rows.rms_norm(empty(64, 16384), empty(16384, dtype=torch.float32), 1e-5)
    yield "D128", lambda: rows.rope(q, k, table, integers(64))
    yield "8xD128", lambda: rows.write(k, v, cache, integers(64))
    yield "width 14336", lambda: rows.gated(empty(64, 28672))
    yield "vocabulary 128256", lambda: rows.argmax(empty(64, 128256, dtype=torch.float32))
    yield "", lambda: rows.take_previous(integers(64), integers(64), integers(64))
    lanes, units = Tile(4, 1024, 4, 1, splits=2, ahead=256), Tile(64, 128, 4, 4, splits=4, dot=True)
    pipelined = Tile(4, 512, 4, 4)
    for kind in ("linear", "gated", "logits"):
        for count, tile in ((1, lanes), (1, pipelined), (2, pipelined), (4, Tile(4, 512, 4, 1)), (16, units)):
            given = empty(count, 4096), empty(8192, 4096), None, tile, kind
            yield f"{kind} M{count} {tile.rows}x{tile.columns}", partial(skinny.product, *given)
    many = Tile(64, 64, 4, 3, splits=2, dot=True), Tile(128, 64, 8, 3, dot=True, tokens=64)
    for kind, count, tile in (
        ("linear", 64, many[0]), ("gated", 128, many[0]), ("linear", 256, many[1]), ("gated", 8192, many[1]),
        ("linear", 64, Tile(128, 64, 8, 3, splits=2, dot=True, tokens=64)),
    ):  # fmt: skip
        given = empty(count, 4096), empty(8192, 4096), None, tile, kind
        yield f"{kind} M{count} {tile.rows}x{tile.columns}", partial(skinny.product, *given)
    for name, dim, group, softcap in (
        ("bfloat16", 64, 8, None),
        ("bfloat16", 128, 4, None),
        ("bfloat16", 256, 4, 50.0),  # as the models with such heads have it
        ("float32", 256, 2, None),
    ):
        dtype = getattr(torch, name)
        yield f"D{dim} G{group} {name}", attend(dtype, dim, group, 0, softcap)
        yield f"D{dim} G{group} {name} splits 8", attend(dtype, dim, group, 8, softcap)
    yield "D128 G4 bfloat16 splits 1", attend(torch.bfloat16, 128, 4, 1)
    yield "D128 G8 bfloat16 splits 8", attend(torch.bfloat16, 128, 8, 8)
    for dtype, dim, group, softcap in (
        (torch.bfloat16, 64, 8, None),
        (torch.bfloat16, 128, 4, None),
        (torch.bfloat16, 256, 4, 50.0),
        (torch.float32, 256, 2, None),
    ):
        yield f"D{dim} G{group} {dtype} shared", attend(dtype, dim, group, 1, softcap, shared=True)
    for name, tokens in (("bfloat16", 4), ("bfloat16", 200), ("bfloat16", 512), ("bfloat16", 8192), ("float32", 64)):
        yield f"64 experts M{tokens} {name}", moe(getattr(torch, name), tokens)


def moe(dtype: Any, tokens: int) -> Callable[[], Any]:
    """DeepSeek-V2-Lite's widths, the groups and the bias of DeepSeek-V3."""
    import torch

    from polyradix.backend.protocol import MoeSpec, MoeWeights
    from polyradix_torch.triton import moe

    def empty(*shape: int, to: Any = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=to, device="meta")

    router = moe.Router(empty(3, 64, 2048, to=torch.bfloat16), empty(64, to=torch.float32))
    weights = MoeWeights(router, empty(64, 2 * 1408, 2048), empty(64, 2048, 1408))
    spec = MoeSpec(64, 6, "sigmoid", True, 2.5, groups=8, top_groups=4, group_best=2)
    return lambda: moe.moe(empty(tokens, 2048), weights, spec)


def attend(
    dtype: Any, dim: int, group: int, splits: int, softcap: float | None = None, shared: bool = False
) -> Callable[[], Any]:
    """A decode of 64 sequences when `splits` is given, else a prefill; some of its keys are shared if so said."""
    import torch

    from polyradix.backend.protocol import AttnSpec, Heads
    from polyradix_torch.triton import attention

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    heads = Heads(8 * group, 8, dim)
    qkv = torch.empty(512, heads.q + 2 * heads.kv, dim, dtype=dtype, device="meta")
    q, k, v = qkv.split([heads.q, heads.kv, heads.kv], dim=1)
    cache = torch.empty(256, 16, heads.kv, dim, dtype=dtype, device="meta")
    single, tiles = (integers(64), integers(0, 2)) if splits else (integers(0), integers(16, 2))
    plan = attention.Shared(integers(64), integers(64), integers(64), integers(32, 5)) if shared else None
    at = attention.Paged(integers(65), integers(64), integers(64), integers(4096), single, splits, tiles, plan)
    return lambda: attention.attend(q, k, v, (cache, cache), at, AttnSpec(heads, dim**-0.5, None, softcap))


def compile_all(chip: str, todo: Iterator[Launch], seconds: float = SECONDS) -> Iterator[Built]:
    """Ends the process when one kernel takes more than `seconds`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from polyradix_torch.triton import attention

    target, run = GPUTarget("cuda", int(chip[3:]), 32), JITFunction.run
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(driver)
    attention._shared = lambda device: SHARED[chip]
    made: list[tuple[str, Any, float]] = []

    def build(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        faulthandler.cancel_dump_traceback_later()
        made.append((self.__name__, kernel, time.perf_counter() - start))

    JITFunction.run = build
    for launch, call in todo:
        print(f"{chip} {launch}", file=sys.stderr, flush=True)
        call()
        for name, kernel, took in made:
            yield Built(chip, launch, name, *usage(kernel.asm["cubin"]), kernel.metadata.shared, round(took, 2))
        made.clear()


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump says no registers: {out!r}")
    return int(found[1]), int(found[2])


def worker(chip: str, source: str = "aot:launches", seconds: float = SECONDS) -> tuple[list[Built], str]:
    """Compiles what `source` (module:function) gives in a process of its own: what it built, and why it failed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:  # a cache of its own, so that every kernel is compiled
        done = subprocess.run(
            [sys.executable, __file__, "--worker", chip, source, str(seconds)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            env=environment | {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"},
        )
    built = [Built(**json.loads(line)) for line in done.stdout.splitlines()]
    return built, f"{chip}: exit status {done.returncode}\n{done.stderr[-8000:]}" if done.returncode else ""


def work(chip: str, source: str, seconds: str) -> None:
    module, name = source.split(":")
    for built in compile_all(chip, getattr(import_module(module), name)(), float(seconds)):
        print(json.dumps(asdict(built)), flush=True)


def table(built: list[Built]) -> str:
    lines = [f"{'chip':7}{'kernel':10}{'launch':32}{'registers':>10}{'stack':>7}{'shared':>9}{'of':>9}{'seconds':>9}"]
    lines += [
        f"{b.chip:7}{b.kernel:10}{b.launch:32}{b.registers:10}{b.stack:7}{b.shared:9}{SHARED[b.chip]:9}{b.seconds:9.2f}"
        for b in built
    ]
    return "\n".join(lines)


def main(chips: list[str]) -> int:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(worker, chips))
    print(table([b for built, _ in done for b in built]))
    wrong = [o for built, _ in done for b in built for o in b.objections] + [why for _, why in done if why]
    print("\n".join(wrong) or "every kernel compiles, none spills, and all fit in shared memory")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:] or list(SHARED)))
