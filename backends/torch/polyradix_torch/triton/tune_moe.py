"""Times the ways to cut products grouped by expert on the GPU at hand, and writes the file of blocks that `moe` reads.

    python -m polyradix_torch.triton.tune_moe [--out FOLDER] [--tokens 1,64] [64x6x1408x2048 ...]

Shapes are experts x top_k x F x H, by default those of DeepSeek-V2-Lite and Qwen3-30B-A3B; every token goes to experts
at random. Blocks are written when they are right and the fastest. What the file says of other shapes stays.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from polyradix_torch.triton import moe, skinny
from polyradix_torch.triton.moe import Blocks, Routes
from polyradix_torch.triton.tune import file_of, microseconds, outcome

MODELS = ("64x6x1408x2048", "128x8x768x2048")
TOKENS = (1, 16, 32, 64, 128, 256, 1024, 8192)
FEW = (  # columns, depth, warps, stages; of at most 32 rows, where the weight is the left operand
    (16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (32, 128, 4, 6), (64, 64, 4, 6), (64, 128, 4, 4),
    (64, 128, 4, 3), (64, 256, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3),
)  # fmt: skip
MANY = (  # rows, columns, depth, warps, stages
    (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4), (64, 64, 128, 4, 3), (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
    (128, 128, 128, 8, 2), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3),
)  # fmt: skip  # each with the weight through pointers, and through a descriptor


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    n: int
    k: int
    gated: bool
    tokens: int

    @property
    def rows(self) -> int:
        """Of an expert, on average."""
        return -(-self.tokens * self.top_k // self.experts)

    @property
    def key(self) -> str:
        return moe.key_of(self.rows, self.n, self.k, self.gated)

    @property
    def given(self) -> int:
        """Rows of x."""
        return self.tokens if self.gated else self.tokens * self.top_k


def parse(text: str, tokens: list[int]) -> Iterator[Shape]:
    experts, top_k, inner, hidden = (int(part) for part in text.split("x"))
    for count in tokens:
        yield Shape(experts, top_k, 2 * inner, hidden, True, count)
        yield Shape(experts, top_k, hidden, inner, False, count)


def candidates(s: Shape) -> Iterator[Blocks]:
    """With the tables' first."""
    yield moe.usual(torch.bfloat16, s.rows, s.gated)
    if s.rows <= 32:
        yield from (Blocks(rows, *rest) for rows in (16, 32)[: 1 + (s.rows > 8)] for rest in FEW)
    if s.rows > 16:
        many = [each for each in MANY if each[0] <= 2 * s.rows and (each[1] <= 128 or not s.gated)]
        yield from (Blocks(*each, wide) for each in many for wide in (False, True))


def routes(s: Shape, seed: int) -> tuple[Routes, torch.Tensor]:
    """Every token to random experts; and each pair's expert."""
    random = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(s.tokens, s.experts, generator=random, device="cuda")
    pairs = scores.topk(s.top_k).indices.flatten()
    order, counts = pairs.argsort(stable=True), pairs.bincount(minlength=s.experts)
    place = torch.arange(len(pairs), device="cuda") - (counts.cumsum(0) - counts)[pairs[order]]
    lists = torch.zeros(s.experts, s.tokens, dtype=torch.int32, device="cuda")
    lists[pairs[order], place] = order.int()
    return Routes(scores[:, : s.top_k].contiguous(), lists, counts.int()), pairs


def build(gated: bool, blocks: Blocks, even: bool) -> str:
    """Compiles blocks into Triton's cache by a small product, in a process of its own. What went wrong, or ""."""
    try:
        s = Shape(4, 2, 128, blocks.depth * 2 + (0 if even else 16), gated, 16)
        x, w = (torch.ones(*n, s.k, dtype=torch.bfloat16, device="cuda") for n in ((s.given,), (s.experts, s.n)))
        moe.product(x, w, routes(s, 0)[0], gated, blocks)
        torch.cuda.synchronize()
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:300]
    return ""


def exact(s: Shape, x: torch.Tensor, w: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """In float32 over float64 sums, one expert after another."""
    given = x.repeat_interleave(s.top_k, 0) if s.gated else x
    out = torch.empty(len(pairs), s.n, dtype=torch.float32, device="cuda")
    for e in range(s.experts):
        out[pairs == e] = (given[pairs == e].double() @ w[e].double().t()).float()
    if s.gated:
        gate, up = out.chunk(2, 1)
        out = F.silu(gate) * up
    return out


def tune(s: Shape, numbers: torch.Tensor, wrong: dict[tuple[bool, Blocks, bool], str]) -> tuple[Blocks, str]:
    """The fastest, and a line of what was tried."""
    w = numbers[: s.experts * s.n * s.k].view(s.experts, s.n, s.k)
    x = torch.randn(s.given, s.k, dtype=torch.bfloat16, device="cuda")
    several = [routes(s, seed) for seed in range(8)]
    want = exact(s, x, w, several[0][1])
    touched = sum(int((r.counts > 0).sum()) for r, _ in several) / len(several)
    read = touched * s.n * s.k * 2
    calls = int(max(8, min(400, 2e9 // read)))
    times: dict[Blocks, float] = {}
    for blocks in dict.fromkeys(candidates(s)):
        run = partial(moe.product, x, w, gated=s.gated, blocks=blocks)
        if why := wrong.get((s.gated, blocks, s.k % blocks.depth == 0)):
            print(f"  {blocks}: {why}", flush=True)
            continue
        error = (run(several[0][0]).float() - want).abs()
        if not bool((error <= 2.0**-7 * want.abs() + 1e-4 * want.abs().max()).all()):
            print(f"  {blocks}: off by {error.max().item():.3g} of {want.abs().max().item():.3g}", flush=True)
            continue
        times[blocks] = microseconds(run, [r for r, _ in several], calls)
    ranked = sorted(times, key=times.__getitem__)
    flops = 2 * s.tokens * s.top_k * s.n * s.k / 1e6
    usual = moe.usual(torch.bfloat16, s.rows, s.gated)
    shown = [*ranked[:2], *(b for b in [usual] if b in times and b not in ranked[:2])]
    each = [f"{short(b)} {times[b]:.1f} us" for b in shown]
    best = times[ranked[0]]
    rates = f"{read / best / 1e6:.2f} TB/s, {flops / best:.0f} TFLOP/s"
    return ranked[0], f"{s.key:32} {s.tokens:5} tokens, {touched:.0f} experts  {'  '.join(each)}  {rates}"


def short(b: Blocks) -> str:
    return f"{b.rows}x{b.columns}x{b.depth}w{b.warps}s{b.stages}{'t' * b.wide}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=skinny.TUNED / "experts")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma separated")
    args = parser.parse_args(arguments)
    shapes = [s for text in args.shapes for s in parse(text, [int(n) for n in args.tokens.split(",")])]
    todo = dict.fromkeys((s.gated, b, s.k % b.depth == 0) for s in shapes for b in candidates(s))
    with torch.inference_mode():
        with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), get_context("spawn")) as pool:
            asked = {key: pool.submit(build, *key) for key in todo}
            wrong = {key: why for key, future in asked.items() if (why := outcome(future))}
        numbers = torch.randn(max(s.experts * s.n * s.k for s in shapes), dtype=torch.bfloat16, device="cuda") / 32
        found = {}
        for s in shapes:
            found[s.key], line = tune(s, numbers, wrong)
            print(line, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = skinny.name_of(torch.device("cuda", torch.cuda.current_device()))
    (args.out / name).write_text(file_of({key: asdict(b) for key, b in found.items()}, skinny.TUNED / "experts" / name))


if __name__ == "__main__":
    main(sys.argv[1:])
