"""Attention kernels on one GPU: plans checked against float64, then timed on the shapes that serving meets.

    python bench/h100_attention.py [--workers 16]

Every part runs in a process of its own, so that a plan that breaks the device costs its part alone. Plans are compiled
beforehand by many processes. Times are of captured launches over caches that together exceed L2, best of five.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_torch.triton import attention
from polyradix_torch.triton.attention import Paged, Plan
from polyradix_torch.triton.upload import upload

LLAMA = Heads(32, 8, 128)
CACHED = 256 << 20  # bytes of keys and values to read before any is read again


@dataclass(frozen=True)
class Case:
    name: str
    seqs: tuple[tuple[int, int], ...]  # (cached, new) tokens
    heads: Heads = LLAMA
    page: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def spec(self) -> AttnSpec:
        return AttnSpec(self.heads, self.heads.dim**-0.5, self.window, self.softcap)

    @property
    def kv_bytes(self) -> int:
        return sum(map(sum, self.seqs)) * 2 * self.heads.kv * self.heads.dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return sum(2 * new * (2 * old + new + 1) * self.heads.q * self.heads.dim for old, new in self.seqs)


ODD = ((0, 1), (0, 33), (37, 100), (256, 64), (0, 200), (5, 1), (1000, 1), (130, 129), (0, 513))
CHECKS = (
    Case("plain", ODD),
    Case("window 70", ODD, window=70),
    Case("softcap", ODD, softcap=5.0),
    Case("D64 G8", ODD, Heads(16, 2, 64), 32, window=200),
    Case("D256 G2 page 1", ODD, Heads(8, 4, 256), 1),
    Case("G7 page 128", ODD, Heads(28, 4, 128), 128),
    Case("D80", ODD, Heads(8, 2, 80)),
    Case("float32", ODD, Heads(8, 2, 128), dtype=torch.float32),
)
PREFILLS = (
    Case("prefill 2 x 4096", ((0, 4096),) * 2),
    Case("prefill 16 x 512", ((0, 512),) * 16),
    Case("prefill 16 x (2048 + 64)", ((2048, 64),) * 16),
)
DECODES = (
    Case("decode 64 x 140", ((139, 1),) * 64),
    Case("decode 256 x 550", ((549, 1),) * 256),
    Case("decode 64 x 4096", ((4095, 1),) * 64),
    Case("decode 1 x 1024", ((1023, 1),)),
)
SPLITS = {DECODES[0].name: (1, 2), DECODES[1].name: (1,), DECODES[2].name: (1, 2, 4), DECODES[3].name: (16, 32)}


def prefill_plans() -> Iterator[Plan]:
    """For heads of 128 in bfloat16."""
    shapes = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4)]
    shapes += [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4)]
    for (rows, keys, warps, stages), dense in product(shapes, (True, False)):
        yield Plan(keys, warps, stages, rows, dense)
        if dense and keys < 128:
            yield Plan(keys, warps, stages, rows, dense, skew=True)
    for rows, keys, warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4)):
        yield Plan(keys, warps, 2, rows, True, pack=False)


def decode_plans(splits: int) -> Iterator[Plan]:
    shapes = ((16, 1), (32, 1), (32, 2), (64, 2), (128, 2), (32, 4), (64, 4), (128, 4))
    for (keys, warps), stages in product(shapes, (1, 2, 3, 5) if splits == 1 else (2, 3)):
        yield Plan(keys, warps, stages)
        if splits > 4:
            yield Plan(keys, warps, stages, fused=True)


@dataclass(frozen=True)
class Data:
    """One step's tensors; the caches of `layers` layers."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: HostBatch


def batch_of(case: Case) -> HostBatch:
    """Pages are shuffled; page 0 and one page in eight are nobody's."""
    new, kv = (np.array(x, np.int32) for x in ([n for _, n in case.seqs], [o + n for o, n in case.seqs]))
    counts = -(-kv // case.page)
    rng = np.random.default_rng(1)
    ids = (rng.permutation(total_pages(case) - 1) + 1)[: counts.sum()].astype(np.int32)
    pages = np.zeros((len(kv), counts.max()), np.int32)
    pages[np.arange(counts.max()) < counts[:, None]] = ids
    cu_q = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(kv, new, strict=True)]).astype(np.int32)
    owner = np.repeat(np.arange(len(kv)), new)
    slots = pages[owner, positions // case.page] * case.page + positions % case.page
    return HostBatch(positions, positions, slots, cu_q, kv, pages, cu_q[1:] - 1, np.full(len(slots), -1, np.int32))


def total_pages(case: Case) -> int:
    return sum(-(-(old + new) // case.page) for old, new in case.seqs) * 8 // 7 + 2


def data_of(case: Case, layers: int, fill: bool) -> Data:
    heads, batch = case.heads, batch_of(case)
    make = torch.randn if fill else torch.empty
    qkv: Any = make(batch.num_tokens, heads.q + 2 * heads.kv, heads.dim, device="cuda", dtype=case.dtype)
    shape = total_pages(case), case.page, heads.kv, heads.dim
    caches = [tuple(make(shape, device="cuda", dtype=case.dtype) for _ in range(2)) for _ in range(layers)]
    q, k, v = qkv.split([heads.q, heads.kv, heads.kv], dim=1)
    slots = torch.from_numpy(batch.slots).cuda().long()
    for pair in caches if fill else ():
        for x, rows in zip(pair, (k, v), strict=True):
            x.flatten(0, 1)[slots] = rows
    return Data(q, k, v, caches, batch)


def paged(case: Case, batch: HostBatch, rows: int, splits: int) -> Paged:
    return upload(batch, case.page, rows, splits, torch.device("cuda"))[0].paged


def launch(case: Case, x: Data, plan: Plan, splits: int, at: Paged) -> Callable[[], torch.Tensor]:
    """Once for every layer; the last one's output [T,Hq,D]."""
    out = torch.zeros_like(x.q, memory_format=torch.contiguous_format)

    def run() -> torch.Tensor:
        for kv in x.caches:
            if plan.rows:
                attention.launch_prefill(x.q, x.k, x.v, kv, out, at, case.spec, plan)
            else:
                attention.launch_decode(x.q, kv, out, at, case.spec, plan)
        return out

    return run


def slots_of(case: Case, batch: HostBatch, s: int) -> torch.Tensor:
    at = np.arange(batch.kv_len[s])
    return torch.from_numpy(batch.pages[s, at // case.page] * case.page + at % case.page).cuda().long()


def expected(case: Case, x: Data) -> torch.Tensor:
    """In float64, over keys taken from the pages."""
    out = torch.zeros(x.q.shape, dtype=torch.float64, device="cuda")
    group, b = case.heads.q // case.heads.kv, x.batch
    for s in range(b.num_seqs):
        rows, slots = slice(int(b.cu_q[s]), int(b.cu_q[s + 1])), slots_of(case, b, s)
        k, v = (c.flatten(0, 1)[slots].double().repeat_interleave(group, 1) for c in x.caches[0])
        score = torch.einsum("thd,khd->htk", x.q[rows].double(), k) * case.spec.scale
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        gap = torch.from_numpy(b.positions[rows]).cuda()[:, None] - torch.arange(len(slots), device="cuda")
        seen = (gap >= 0) & (gap < (case.window or 1 << 30))
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("htk,khd->thd", weight, v)
    return out


def poison(case: Case, x: Data) -> None:
    """What no sequence owns is NaN, the rest of a last page too."""
    mine = torch.cat([slots_of(case, x.batch, s) for s in range(x.batch.num_seqs)])
    for c in x.caches[0]:
        kept = c.flatten(0, 1)[mine]
        c.fill_(torch.nan)
        c.flatten(0, 1)[mine] = kept


Job = tuple[Case, Plan, int]


def check_jobs(decode: bool) -> Iterator[Job]:
    """Every plan on the plain case; on others what serving uses, and each switch turned."""
    for case in CHECKS:
        x = torch.empty(1, 1, case.heads.dim, dtype=case.dtype, device="cuda")
        if decode:
            yield from ((case, replace(attention.decode_plan(x), fused=f), n) for f, n in ((False, 1), (True, 3)))
            continue
        usual = attention.prefill_plan(x)
        yield case, usual, 1
        if usual.dense:
            yield from ((case, p, 1) for p in (replace(usual, skew=True), replace(usual, dense=False)))
    for splits in (1, 4, 16) if decode else (1,):
        yield from ((CHECKS[0], plan, splits) for plan in (decode_plans(splits) if decode else prefill_plans()))


def time_jobs(decode: bool) -> Iterator[Job]:
    for case in DECODES if decode else PREFILLS:
        for splits in SPLITS[case.name] if decode else (1,):
            yield from ((case, plan, splits) for plan in (decode_plans(splits) if decode else prefill_plans()))


def title(plan: Plan, splits: int) -> str:
    on = [name for name in ("dense", "skew", "pack") if plan.rows and getattr(plan, name)]
    cut = f"{plan.rows}x{plan.keys}" if plan.rows else f"splits {splits}{' fused' * plan.fused} keys {plan.keys}"
    return " ".join([cut, f"warps {plan.warps} stages {plan.stages}", *on])


def tried(name: str, run: Callable[[], Any]) -> Any:
    """What `run` gives, or None when it fails; a broken device ends the process."""
    try:
        result = run()
        torch.cuda.synchronize()
        return result
    except Exception as e:
        print(f"FAILED  {name}: {type(e).__name__} {str(e)[:200]}", flush=True)
        if "CUDA error" in str(e):
            raise SystemExit(1) from e
        return None


def prepared(case: Case) -> tuple[Data, torch.Tensor]:
    torch.manual_seed(0)
    x = data_of(case, 1, True)
    x.q.mul_(2)  # peaked, so that single keys matter
    poison(case, x)
    return x, expected(case, x)


def error(x: Data, got: torch.Tensor, want: torch.Tensor, decode: bool) -> float:
    """The worst sequence's root mean square error, as a share of that of `want`; infinity for NaN."""
    worst = 0.0
    for s in np.flatnonzero((np.diff(x.batch.cu_q) == 1) == decode):
        rows = slice(int(x.batch.cu_q[s]), int(x.batch.cu_q[s + 1]))
        share = ((got[rows].double() - want[rows]).norm() / want[rows].norm()).nan_to_num(torch.inf)
        worst = max(worst, float(share))
    return worst


def check(decode: bool) -> None:
    bad = count = 0
    sides = {case: prepared(case) for case in CHECKS}
    for case, plan, splits in check_jobs(decode):
        x, want = sides[case]
        name = f"{case.name}: {title(plan, splits)}"
        at = paged(case, x.batch, plan.rows or 64, splits)
        got = tried(name, launch(case, x, plan, splits, at))
        worst = torch.inf if got is None else error(x, got, want, decode)
        bound = 6e-3 if case.dtype == torch.bfloat16 else 1e-5
        if worst > bound:
            print(f"WRONG   {name}: relative error {worst:.1e}, bound {bound:.0e}", flush=True)
        bad, count = bad + (worst > bound), count + 1
    print(f"{'decode' if decode else 'prefill'} checks: {bad} of {count} wrong", flush=True)


def seconds(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
        run()
    times = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 2e3)
    return min(times[1:])


def measure(decode: bool) -> None:
    found: dict[str, list[tuple[float, str]]] = {}
    data: dict[Case, Data] = {}
    for case, plan, splits in time_jobs(decode):
        if case not in data:
            data.clear()
            data[case] = data_of(case, max(1, min(32, -(-CACHED // case.kv_bytes))), True)
        x, name = data[case], title(plan, splits)
        at = paged(case, x.batch, plan.rows or 64, splits)
        took = tried(f"{case.name}: {name}", partial(seconds, launch(case, x, plan, splits, at)))
        if took is not None:
            took /= len(x.caches)
            line = f"{took * 1e6:8.1f} us {rate(case, decode, took)}  {name}"
            found.setdefault(case.name, []).append((took, line))
    for case_name, rows in found.items():
        best = sorted(rows)
        print(
            "\n  ".join([f"\n{case_name}, {len(rows)} plans", *(line for _, line in best[:16]), "slowest", best[-1][1]])
        )


def rate(case: Case, decode: bool, took: float) -> str:
    return f"{case.kv_bytes / took / 1e12:6.2f} TB/s" if decode else f"{case.flops / took / 1e12:6.0f} TFLOP/s"


def compile_one(job: Job) -> str:
    """Compiles what the launch needs into the cache on disk, and runs nothing."""
    case, plan, splits = job
    try:
        JITFunction.run = compiling()
        small = replace(case, seqs=((0, 2),) if plan.rows else ((0, 1),))
        x = data_of(small, 1, False)
        launch(small, x, plan, splits, paged(small, x.batch, plan.rows or 64, splits))()
    except Exception as e:
        return f"NO CODE {title(plan, splits)} ({case.heads.dim}): {type(e).__name__} {str(e)[:200]}"
    return ""


@cache
def compiling() -> Any:
    run = JITFunction.run
    return lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)


def build(workers: int) -> None:
    def key(job: Job) -> Any:
        case, plan, splits = job
        return case.heads, case.page, case.window is None, case.softcap, case.dtype, plan, splits

    jobs = {key(j): j for decode in (True, False) for j in (*check_jobs(decode), *time_jobs(decode))}
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for problem in pool.imap_unordered(compile_one, jobs.values()):
            if problem:
                print(problem, flush=True)
    print(f"{len(jobs)} plans compiled in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=16)
    build(parser.parse_args().workers)
    for part, decode in product((check, measure), (False, True)):
        process = multiprocessing.get_context("spawn").Process(target=part, args=(decode,))
        process.start()
        process.join()
        if process.exitcode:
            print(f"{part.__name__} {'decode' if decode else 'prefill'} ended with {process.exitcode}", flush=True)


if __name__ == "__main__":
    main()
