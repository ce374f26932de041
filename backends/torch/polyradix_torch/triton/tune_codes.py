"""Times the ways to cut products with FP8 and int4 weights on the GPU at hand, and writes the file that `codes` reads.

    python -m polyradix_torch.triton.tune_codes [--out FOLDER] [--rows 1,64] [--tokens 1,64] [7168x16384 ...]

Shapes are NxK of linears, and experts x top_k x F x H; by default those of DeepSeek-V3 and Llama-3.1-8B, and experts
of DeepSeek-V2-Lite. A cut is written when it is right, gives the same bits twice, and is the fastest; null where a
dense weight is. What the file says of other shapes stays. Weights take turns, so that none is left in the L2 cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from polyradix.backend.protocol import Quant
from polyradix_torch.quant import Codes
from polyradix_torch.triton import codes, moe, quant, skinny, tune_moe
from polyradix_torch.triton.codes import Cut, Form
from polyradix_torch.triton.tune import file_of, microseconds, outcome

MODELS = ("1536x7168", "24576x1536", "7168x16384", "36864x7168", "7168x18432", "6144x4096", "4096x4096", "28672x4096",
          "4096x14336", "64x6x1408x2048")  # fmt: skip
FORMATS = Quant("fp8", (128, 128)), Quant("int4", (1, 128))
COUNTS = (1, 2, 16, 32, 64, 128)
TOKENS = (1, 16, 128, 256, 512, 1024, 2048, 8192)
TURNS = 256 << 20  # bytes of weights that take turns
CALLS = 24
Run = Callable[[Codes], Tensor]
Wrong = dict[tuple[Quant, Cut, bool], str]
LANES = ((8, 512, 4), (2, 2048, 4), (4, 2048, 8), (1, 4096, 4))  # rows, depth, warps
FEW: dict[int, tuple[tuple[int, int, int, int, Form], ...]] = {  # by rows of x: rows, depth, warps, stages
    16: ((128, 128, 8, 3, "right"), (128, 128, 8, 5, "right"), (128, 256, 8, 3, "right"), (256, 128, 8, 3, "right"),
         (256, 128, 8, 4, "right"), (128, 128, 4, 3, "right"), (64, 128, 4, 4, "right"), (64, 128, 4, 6, "right"),
         (64, 256, 4, 3, "right"), (64, 128, 2, 4, "right")),
    32: ((128, 128, 4, 3, "right"), (128, 128, 8, 3, "right"), (128, 256, 4, 2, "right"), (64, 128, 4, 4, "right"),
         (128, 128, 8, 3, "left"), (64, 128, 4, 3, "left"), (128, 256, 8, 2, "left"), (256, 128, 8, 3, "left")),
    64: ((128, 128, 4, 3, "right"), (128, 64, 4, 4, "right"), (64, 128, 4, 3, "right"), (128, 128, 8, 3, "left"),
         (64, 128, 4, 3, "left"), (256, 128, 8, 3, "left"), (256, 64, 8, 4, "left"), (128, 256, 8, 2, "left")),
    128: ((128, 128, 8, 3, "right"), (128, 64, 8, 3, "right"), (64, 64, 4, 4, "right"), (128, 64, 4, 3, "right"),
          (256, 64, 8, 3, "right"), (128, 64, 8, 4, "left"), (128, 128, 8, 2, "left"), (256, 64, 8, 3, "left")),
    256: ((128, 64, 8, 3, "right"), (64, 64, 8, 3, "right"), (64, 64, 8, 3, "left"), (128, 64, 8, 3, "left")),
}  # fmt: skip


def weight(q: Quant, *shape: int) -> Codes:
    (*outer, out, width), (rows, columns), four = shape, q.block, q.format == "int4"
    blocks = *outer, -(-out // rows), -(-width // columns)
    bits = torch.randint(0, 256, (*outer, out, width // 2 if four else width), device="cuda", dtype=torch.uint8)
    if not four:
        bits &= 0xDF  # none is NaN
    scale = (0.5 + torch.rand(blocks, device="cuda")) / (8 * width**0.5)
    zero = torch.randint(0, 16, blocks, device="cuda", dtype=torch.uint8) if four else None
    return Codes(q, bits if four else bits.view(torch.float8_e4m3fn), scale, zero)


def candidates(count: int, linear: bool) -> Iterator[Cut]:
    """For so many rows of x; of experts, on average."""
    padded = triton.next_power_of_2(max(16, count))
    if linear and count <= 2:
        for rows, depth, warps in LANES:
            yield Cut(count, rows, depth, warps, 1, form="lanes")
    sizes = [padded] if linear else [t for t in FEW if padded // 2 <= t <= 2 * padded]
    for tokens in [min(t, 256) for t in sizes] + [128] * (padded >= 256):
        for rows, depth, warps, stages, form in FEW[tokens]:
            for fold in (False, True) if tokens >= 64 else (False,):
                if fold or tokens * rows <= 64 * 32 * warps:
                    yield Cut(tokens, rows, depth, warps, stages, 1, form, fold)


def guesses(cut: Cut, count: int, n: int, k: int) -> list[int]:
    """At the number of parts, the best first."""
    return list(dict.fromkeys(codes.parts(cut, count, n, k, each) for each in (2, 1, 3, 4)))


def build(q: Quant, cut: Cut, linear: bool) -> str:
    """Compiles a cut into Triton's cache by a small product, in a process of its own. What went wrong, or ""."""
    try:
        k = 2 * cut.depth * cut.splits
        if linear:
            x = torch.ones(min(16, cut.tokens), k, dtype=torch.bfloat16, device="cuda")
            codes.product(x, weight(q, 256, k), None, cut)
        else:
            s = tune_moe.Shape(64, 6, 256, max(k, 256), True, 16)
            x = torch.ones(16, s.k, dtype=torch.bfloat16, device="cuda")
            quant.product(x, weight(q, 64, 256, s.k), tune_moe.routes(s, 0)[0], cut)
        torch.cuda.synchronize()
    except Exception as e:
        return f"{type(e).__name__}: {e}"[-300:]
    return ""


def check(run: Callable[[], Tensor], want: Tensor, rounded: bool) -> None:
    """Raises ValueError unless both of two runs are within one rounding, and of a weight that is rounded too the error
    that this has on average, and alike."""
    got, again = run(), run()
    error = (got.float() - want).abs()
    bound = 2.0**-7 * want.abs() + (2e-3 if rounded else 1e-5) * want.abs().max()
    if not (error <= bound).all():
        raise ValueError(f"off by up to {error.max().item():.3g} at values up to {want.abs().max().item():.3g}")
    if not torch.equal(got, again):
        raise ValueError("two runs differ")


@dataclass
class Tried:
    """Microseconds by cut, None for a dense weight."""

    key: str
    bf16: float
    read: int
    times: dict[Cut | None, float]
    wrong: dict[Cut | None, str]

    @property
    def ranked(self) -> list[Cut | None]:
        return sorted(self.times, key=self.times.__getitem__)

    def __str__(self) -> str:
        best = self.ranked[:3] + [None] * (None in self.times and None not in self.ranked[:3])
        each = [f"{short(c)} {self.times[c]:.1f}" for c in best]
        wrong = [f"\n  {short(c)}: {why}" for c, why in self.wrong.items()]
        us = self.times[self.ranked[0]]
        rate = f"{us / self.bf16:5.2f} of it, {self.read / us / 1e6:.2f} TB/s"
        return f"{self.key:46} bf16 {self.bf16:7.1f} us  {rate}  {'  '.join(each)}{''.join(wrong)}"


def short(c: Cut | None) -> str:
    if c is None:
        return "dense"
    return f"{c.form}{'-fold' * c.fold} {c.tokens}x{c.rows}x{c.depth}w{c.warps}s{c.stages}p{c.splits}"


def attempt(tried: Tried, cut: Cut | None, why: str, run: Run, each: list[Codes], want: Tensor, calls: int) -> None:
    if cut in tried.times or cut in tried.wrong:
        return
    try:
        if why:
            raise RuntimeError(why)
        check(lambda: run(each[0]), want, cut is None or cut.fold)
        tried.times[cut] = microseconds(run, each, calls)
    except Exception as e:
        tried.wrong[cut] = f"{type(e).__name__}: {e}"[-200:]


def linears(n: int, k: int, counts: list[int], wrong: Wrong) -> Iterator[Tried]:
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(max(2, min(CALLS, TURNS // (2 * n * k))))]
    full = torch.randn(max(counts), k, device="cuda").bfloat16()
    plain = {m: microseconds(partial(F.linear, full[:m]), dense, CALLS) for m in counts}
    del dense
    for q in FORMATS:
        each = [weight(q, n, k) for _ in range(max(2, min(CALLS, TURNS // q.bytes((n, k)))))]
        wide = torch.cat([full.double() @ part.t() for part in each[0].weight().double().split(8192)], 1).float()
        for m in counts:
            tried = Tried(codes.key_of("linear", q, m, n, k), plain[m], q.bytes((n, k)), {}, {})
            linear(tried, q, full[:m], each, wide[:m], wrong)
            yield tried


def linear(tried: Tried, q: Quant, x: Tensor, each: list[Codes], want: Tensor, wrong: Wrong) -> None:
    (m, k), n = x.shape, want.shape[1]

    def take(cut: Cut | None) -> None:
        def run(w: Codes) -> Tensor:
            return F.linear(x, codes.dense(w, x.dtype)) if cut is None else codes.product(x, w, None, cut)

        why = "" if cut is None else wrong.get(signature(q, cut, True), "")
        attempt(tried, cut, why, run, each, want, CALLS)

    if m >= 64:
        take(None)
    for cut in candidates(m, True):
        take(replace(cut, splits=guesses(cut, m, n, k)[0]))
    for best in [cut for cut in tried.ranked[:3] if cut]:
        for p in guesses(best, m, n, k)[1:]:
            take(replace(best, splits=p))


def grouped(s: tune_moe.Shape, wrong: Wrong) -> Iterator[Tried]:
    x = torch.randn(s.given, s.k, device="cuda").bfloat16()
    routes, pairs = tune_moe.routes(s, 0)
    calls = CALLS if s.tokens < 1024 else 6
    dense = torch.randn(s.experts, s.n, s.k, device="cuda").bfloat16()
    plain = microseconds(lambda w: moe.product(x, w, routes, False), [dense], calls)
    del dense
    for q in FORMATS:
        w = weight(q, s.experts, s.n, s.k)
        given = x.repeat_interleave(s.top_k, 0) if s.gated else x
        want = torch.empty(len(pairs), s.n, device="cuda")
        for e in range(s.experts):
            want[pairs == e] = (given[pairs == e].double() @ w[e].weight().double().t()).float()
        read = q.bytes((s.n, s.k)) * int((routes.counts > 0).sum())
        tried = Tried(codes.key_of("experts", q, s.rows, s.n, s.k), plain, read, {}, {})
        for cut in candidates(s.rows, False):
            why = wrong.get(signature(q, cut, False), "")
            attempt(tried, cut, why, partial(quant.product, x, routes=routes, cut=cut), [w], want, calls)
        yield tried


def signature(q: Quant, cut: Cut, linear: bool) -> tuple[Quant, Cut, bool]:
    return q, replace(cut, splits=min(cut.splits, 2)), linear


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=skinny.TUNED / "codes")
    parser.add_argument(
        "--rows", default=",".join(map(str, COUNTS)), help="of x, comma separated: 1, 2, or powers of two from 16 on"
    )
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of experts, comma separated")
    args = parser.parse_args(arguments)
    counts, tokens = ([int(n) for n in text.split(",")] for text in (args.rows, args.tokens))
    sizes = [tuple(map(int, text.split("x"))) for text in args.shapes]
    shapes = [s for text in args.shapes if text.count("x") == 3 for s in tune_moe.parse(text, tokens)]
    begun = time.perf_counter()
    todo = {
        signature(q, replace(cut, splits=p), True): None
        for q in FORMATS for n, k in (s for s in sizes if len(s) == 2) for m in counts
        for cut in candidates(m, True) for p in guesses(cut, m, n, k)
    } | {(q, cut, False): None for q in FORMATS for s in shapes for cut in candidates(s.rows, False)}  # fmt: skip
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as the backend has it
    gc.freeze()  # torch collects garbage before each capture
    with torch.inference_mode():
        with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), get_context("spawn")) as pool:
            asked = {key: pool.submit(build, *key) for key in todo}
            wrong = {key: why for key, future in asked.items() if (why := outcome(future))}
        print(f"{len(todo)} kernels compiled in {time.perf_counter() - begun:.0f} s", flush=True)
        found: list[Tried] = []
        for n, k in (s for s in sizes if len(s) == 2):
            for tried in linears(n, k, counts, wrong):
                found.append(tried)
                print(tried, flush=True)
        for s in shapes:
            for tried in grouped(s, wrong):
                found.append(tried)
                print(tried, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = skinny.name_of(torch.device("cuda", torch.cuda.current_device()))
    best = {t.key: t.ranked[0] and asdict(t.ranked[0]) for t in found if t.times}
    (args.out / name).write_text(file_of(best, skinny.TUNED / "codes" / name))
    (args.out / "times.json").write_text(json.dumps({t.key: {short(c): t.times[c] for c in t.ranked} for t in found}))
    print(f"{time.perf_counter() - begun:.0f} s in all", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
