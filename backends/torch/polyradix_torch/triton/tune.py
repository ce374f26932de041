"""Times the ways to cut products of few rows on the GPU at hand, and writes the file of tiles that `skinny` reads.

    python -m polyradix_torch.triton.tune [--out FOLDER] [--rows 1,64] [linear:6144x4096 ...]

Shapes are kind:NxK, by default those of Llama-3.1-8B. A tile is written when it is right, gives the same bits twice,
and pays; null is written where none does. What the file says of other shapes stays. Weights take turns, so that none is
left in the L2 cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton

from polyradix_torch.triton import rows, skinny
from polyradix_torch.triton.skinny import Kind, Tile, product

LLAMA = ("linear:6144x4096", "linear:4096x4096", "gated:28672x4096", "linear:4096x14336", "logits:128256x4096")
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 8192)  # rows of x; more than 256 are tried with a gate only
LANES = (  # rows, columns, warps, stages
    (2, 1024, 4, 1), (2, 2048, 4, 1), (4, 512, 4, 1), (4, 1024, 4, 1), (4, 2048, 8, 1), (8, 512, 4, 1), (8, 256, 4, 1),
    (8, 1024, 8, 1), (16, 256, 4, 1), (4, 512, 4, 4), (4, 1024, 4, 3), (8, 512, 4, 4),
)  # fmt: skip
UNITS = ((64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (32, 256, 2, 4), (32, 128, 2, 6), (128, 128, 8, 3))
MORE = {  # by rows of x, after them: tokens
    32: ((64, 128, 4, 4, 0), (64, 128, 4, 6, 0), (64, 128, 4, 3, 0), (128, 128, 8, 3, 0), (128, 64, 4, 6, 0),
         (32, 128, 2, 6, 0)),
    64: ((64, 128, 4, 4, 0), (64, 128, 4, 3, 0), (64, 64, 4, 8, 0), (128, 64, 4, 6, 0), (128, 128, 8, 4, 0),
         (64, 128, 4, 6, 64), (128, 64, 4, 6, 64), (128, 128, 4, 4, 64), (128, 64, 4, 4, 64), (256, 64, 8, 5, 64)),
    128: ((64, 64, 4, 6, 0), (64, 128, 4, 4, 0), (64, 64, 4, 4, 0), (128, 64, 8, 6, 0),
          (128, 64, 8, 6, 128), (128, 64, 4, 6, 128), (128, 64, 4, 3, 128), (64, 64, 4, 4, 128), (256, 64, 8, 4, 128)),
    256: ((128, 64, 8, 4, 0), (64, 64, 4, 5, 0),
          (128, 64, 8, 4, 256), (128, 64, 8, 6, 128), (128, 64, 4, 3, 128), (256, 64, 8, 4, 128), (64, 64, 4, 4, 128)),
    8192: ((256, 64, 8, 4, 128), (256, 64, 8, 3, 128), (128, 64, 8, 4, 256)),
}  # fmt: skip
PROCESSORS = 132  # what splits are guessed for
AHEAD = (0, 512, 1024, 2048)  # beside 256, which all are tried with
Shape = tuple[Kind, int, int, int]  # kind, count, n, k
T = TypeVar("T")


def pays(tile: float, library: float) -> bool:
    """Whether a tile is worth another kernel to compile, half a second or so, before the first answer; microseconds."""
    return tile < max(0.9 * library, library - 2)


@dataclass
class Tried:
    """Microseconds of one product, by tile; what went wrong with others."""

    shape: Shape
    torch: float
    tiles: dict[Tile, float] = field(default_factory=dict)
    wrong: dict[Tile, str] = field(default_factory=dict)

    @property
    def best(self) -> Tile | None:
        return next((tile for tile in self.ranked[:1] if pays(self.tiles[tile], self.torch)), None)

    @property
    def ranked(self) -> list[Tile]:
        return sorted(self.tiles, key=self.tiles.__getitem__)

    def __str__(self) -> str:
        kind, count, n, k = self.shape
        each = [("torch", self.torch), *((short(tile), self.tiles[tile]) for tile in self.ranked[:3])]
        flops = 2 * count * n * k / 1e6
        times = [f"{name} {us:.1f} us ({2 * n * k / us / 1e6:.2f} TB/s, {flops / us:.0f} TFLOP/s)" for name, us in each]
        wrong = [f"\n  {short(tile)}: {why}" for tile, why in self.wrong.items()]
        return f"{kind:7}{count:4} x {n:6} x {k:5}  {'  '.join(times)}{''.join(wrong)}"


def short(tile: Tile) -> str:
    """rows x columns, w warps, s stages, p parts, a ahead; + for the matrix units, t tokens."""
    mark = f"t{tile.tokens}" if tile.tokens else "+" if tile.dot else ""
    return f"{tile.rows}x{tile.columns}w{tile.warps}s{tile.stages}p{tile.splits}a{tile.ahead}{mark}"


def candidates(kind: Kind, count: int, n: int) -> Iterator[Tile]:
    padded = triton.next_power_of_2(count)
    if padded > 16:
        for rows_, columns, warps, stages, tokens in MORE.get(padded, ()):
            tiles = triton.cdiv(n, rows_) * (triton.cdiv(count, tokens) if tokens else 1)
            for splits in [1] if kind == "gated" and tokens else likely(tiles):
                yield Tile(rows_, columns, warps, stages, splits, True, 0 if tokens else 256, tokens)
        return
    for rows_, columns, warps, stages in LANES:
        if padded <= 4 and padded * rows_ * columns <= 64 * 32 * warps:
            yield Tile(rows_, columns, warps, stages, ahead=256)
            if n <= 8192 and rows_ * columns == 4096 and stages == 1:
                yield Tile(rows_, columns, warps, stages, 2, ahead=256)
    for rows_, columns, warps, stages in UNITS:
        programs = triton.cdiv(n, rows_)
        enough = [splits for splits in (1, 2, 4, 8) if programs * splits >= 180 or splits == 8]
        for splits in enough[: 2 if programs < 1000 else 1]:
            yield Tile(rows_, columns, warps, stages, splits, dot=True, ahead=256)


def likely(tiles: int) -> list[int]:
    """The two best guesses at the number of parts: whole rounds of programs, less what joining costs."""
    return sorted(range(1, 9), key=lambda p: triton.cdiv(tiles * p, PROCESSORS) / p * (1 + 0.04 * p))[:2]


def build(kind: Kind, count: int, tile: Tile) -> str:
    """Compiles a tile into Triton's cache by a small product, in a process of its own. What went wrong, or ""."""
    try:
        x = torch.ones(count, 2 * tile.columns * tile.splits, dtype=torch.bfloat16, device="cuda")
        product(x, x[:1].expand(16 * tile.rows, -1).contiguous(), None, tile, kind)
        torch.cuda.synchronize()
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:300]
    return ""


def build_all(shapes: list[Shape]) -> dict[tuple[bool, bool, int, Tile], str]:
    """What went wrong, of all that `tune` may try. Kinds and counts that share their code share their entry."""
    todo: dict[tuple[bool, bool, int, Tile], Shape] = {}
    for kind, count, n, k in shapes:
        for tile in candidates(kind, count, n):
            todo.setdefault(signature(kind, count, tile), (kind, count, n, k))
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), get_context("spawn")) as pool:
        asked = {key: pool.submit(build, shape[0], shape[1], key[-1]) for key, shape in todo.items()}
        return {key: outcome(future) for key, future in asked.items()}


def outcome(future: Future[str]) -> str:
    try:
        return future.result()
    except Exception as e:  # the process died
        return f"{type(e).__name__}: {e}"


def signature(kind: Kind, count: int, tile: Tile) -> tuple[bool, bool, int, Tile]:
    padded = 0 if tile.tokens else triton.next_power_of_2(max(count, skinny.LEAST if tile.dot else 1))
    return kind == "gated", kind == "logits", padded, replace(tile, splits=min(tile.splits, 2), ahead=0)


def by_torch(kind: Kind, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if kind == "logits":
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return rows.gated(F.linear(x, w), "silu") if kind == "gated" else F.linear(x, w)


def exact(kind: Kind, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """In float64."""
    out = torch.cat([x.double() @ part.double().t() for part in w.split(8192)], 1)
    if kind == "gated":
        gate, up = out.chunk(2, 1)
        out = F.silu(gate) * up
    return out


def check(run: Callable[[], torch.Tensor], want: torch.Tensor) -> None:
    """Raises ValueError unless both of two runs are within one rounding, and alike."""
    got, again = run(), run()
    error = (got.double() - want).abs()
    bound = (2.0**-8 if got.dtype == torch.bfloat16 else 0.0) * want.abs() + 1e-5 * want.abs().max()
    if not (error <= bound).all():
        raise ValueError(f"off by up to {error.max().item():.3g} at values up to {want.abs().max().item():.3g}")
    if not torch.equal(got, again):
        raise ValueError("two runs differ")


def microseconds(call: Callable[[T], torch.Tensor], given: Sequence[T], calls: int) -> float:
    """Of one call in a graph of many, with one thing that is given after another."""
    call(given[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(given[i % len(given)])
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return float(statistics.median(times[1:]))


def tune(shape: Shape, numbers: torch.Tensor, built: dict[tuple[bool, bool, int, Tile], str]) -> Tried:
    """Weights are cut from `numbers` (bfloat16, one dimension)."""
    kind, count, n, k = shape
    weights = [w.view(n, k) for w in numbers.split(n * k) if w.numel() == n * k][:12]
    x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")
    want = exact(kind, x, weights[0])
    calls = max(8, 2 * 10**9 // weights[0].nbytes)
    tried = Tried(shape, microseconds(lambda w: by_torch(kind, x, w), weights, calls))

    def attempt(tile: Tile) -> None:
        try:
            if why := built.get(signature(kind, count, tile)):
                raise RuntimeError(why)
            check(lambda: product(x, weights[0], None, tile, kind), want)
            tried.tiles[tile] = microseconds(lambda w: product(x, w, None, tile, kind), weights, calls)
        except Exception as e:
            tried.wrong[tile] = f"{type(e).__name__}: {e}"[:300]

    for tile in candidates(kind, count, n):
        attempt(tile)
    for tile in [tile for tile in tried.ranked[:2] if not tile.tokens]:
        for ahead in AHEAD:
            attempt(replace(tile, ahead=ahead))
    return tried


def parse(text: str) -> tuple[Kind, int, int]:
    kind, shape = text.split(":")
    n, k = (int(part) for part in shape.split("x"))
    for known in ("linear", "gated", "logits"):
        if kind == known:
            return known, n, k
    raise ValueError(f"kind is {kind!r}; expected linear, gated or logits")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=LLAMA)
    parser.add_argument("--out", type=Path, default=skinny.TUNED)
    parser.add_argument("--rows", default=",".join(map(str, COUNTS)), help="of x, comma separated; powers of two")
    args = parser.parse_args(arguments)
    counts = [int(count) for count in args.rows.split(",")]
    shapes = [(*shape, count) for shape in map(parse, args.shapes) for count in counts]
    shapes = [(kind, count, n, k) for kind, n, k, count in shapes if count <= 256 or kind == "gated"]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as the backend has it
    gc.freeze()  # torch collects garbage before each capture
    with torch.inference_mode():
        built = build_all(shapes)
        most = max(n * k for _, _, n, k in shapes)
        numbers = torch.randn(max(most, 1 << 29), dtype=torch.bfloat16, device="cuda") / 64
        found = []
        for shape in shapes:
            found.append(tune(shape, numbers, built))
            print(found[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = skinny.name_of(torch.device("cuda", torch.cuda.current_device()))
    tiles = {skinny.key_of(*t.shape): t.best and asdict(t.best) for t in found}
    (args.out / name).write_text(file_of(tiles, skinny.TUNED / name))
    times = {skinny.key_of(*t.shape): {short(i): t.tiles[i] for i in t.ranked} for t in found}
    (args.out / "times.json").write_text(json.dumps(times, indent=1))


def file_of(found: Mapping[str, object], old: Path) -> str:
    """Of what is found for each key, with what `old` says of others."""
    products: dict[str, object] = json.loads(old.read_text())["products"] if old.exists() else {}
    products.update(found)
    lines = [f"  {json.dumps(key)}: {json.dumps(each)}" for key, each in products.items()]
    about = f'"torch": "{torch.__version__}", "triton": "{triton.__version__}"'
    return "{" + about + ', "products": {\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
