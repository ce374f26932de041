"""Attention kernels on one GPU: checked against float64, then timed on the shapes that serving meets: prefill and
decode as they are, decode over float8 by other plans too, shared keys by several, after decode that knows none.

    python bench/h100_attention.py [--workers 16] [--only float8]

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
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_torch.host import movable
from polyradix_torch.triton import attention, prefix
from polyradix_torch.triton.attention import Paged, Plan
from polyradix_torch.triton.capture import splits_for
from polyradix_torch.triton.rows import write
from polyradix_torch.triton.upload import upload

LLAMA = Heads(32, 8, 128)
CACHED = 256 << 20  # bytes of keys and values to read before any is read again


@dataclass(frozen=True)
class Case:
    name: str
    seqs: tuple[tuple[int, int], ...]  # (cached, new) tokens
    groups: int = 0  # sequence i is in group i % groups,
    common: int = 0  # which has so many first tokens in common
    heads: Heads = LLAMA
    page: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    eight: bool = False  # the cache is float8

    @property
    def held(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.eight else self.dtype

    @property
    def spec(self) -> AttnSpec:
        return AttnSpec(self.heads, self.heads.dim**-0.5, self.window, self.softcap)

    @property
    def kv_bytes(self) -> int:
        """Each key once."""
        tokens = sum(map(sum, self.seqs)) - (len(self.seqs) - self.groups) * self.common * (self.groups > 0)
        return tokens * 2 * self.heads.kv * self.heads.dim * self.held.itemsize

    @property
    def flops(self) -> int:
        return sum(2 * new * (2 * old + new + 1) * self.heads.q * self.heads.dim for old, new in self.seqs)


ODD = ((0, 1), (0, 33), (37, 100), (256, 64), (0, 200), (5, 1), (1000, 1), (130, 129), (0, 513))
LONG = ((1100, 1), (1037, 1), (1500, 1), (1034, 1)) * 6 + ((40, 1), (0, 70))  # some share, others do not


def kinds(seqs: tuple[tuple[int, int], ...], common: int = 0) -> tuple[Case, ...]:
    sharing = {"groups": 2 * (common > 0), "common": common}
    return (
        Case("plain", seqs, **sharing),
        Case("softcap", seqs, softcap=5.0, **sharing),
        Case("D64 G8 window 200", seqs, heads=Heads(16, 2, 64), page=32, window=200, **sharing),
        Case("D64 G8", seqs, heads=Heads(16, 2, 64), page=32, **sharing),
        Case("D256 G2 page 1", seqs, heads=Heads(8, 4, 256), page=1, **sharing),
        Case("G7 page 128", seqs, heads=Heads(28, 4, 128), page=128, **sharing),
        Case("D80", seqs, heads=Heads(8, 2, 80), **sharing),
        Case("float32", seqs, heads=Heads(8, 2, 128), dtype=torch.float32, **sharing),
        Case("float8", seqs, eight=True, **sharing),
        Case("float8 D64 G8 window 200", seqs, heads=Heads(16, 2, 64), page=32, window=200, eight=True, **sharing),
        Case("float8 D256 G2 page 1", seqs, heads=Heads(8, 4, 256), page=1, eight=True, **sharing),
        Case("float8 of float32", seqs, heads=Heads(8, 2, 128), dtype=torch.float32, eight=True, **sharing),
    )


CHECKS = *kinds(ODD), *kinds(LONG, 1024)
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
SHARED = (
    Case("shared 8 x 32 x (2048 + 96)", ((2143, 1),) * 256, 8, 2048),
    Case("shared 1 x 64 x (4096 + 128)", ((4223, 1),) * 64, 1, 4096),
    Case("shared 16 x 4 x (512 + 96)", ((607, 1),) * 64, 16, 512),
    Case("shared 1 x 16 x (576 + 96)", ((671, 1),) * 16, 1, 576),
    Case("shared 1 x 5 x (2048 + 96)", ((2143, 1),) * 5, 1, 2048),
)
EIGHTS = tuple(replace(case, name=f"{case.name} float8", eight=True) for case in (*PREFILLS, *DECODES))
MEASURED = *PREFILLS, *DECODES, *EIGHTS, *SHARED
PROCESSORS = 132


@dataclass(frozen=True)
class Try:
    """One way to launch a case: its plan, and of shared keys the tile's plan and how they are cut."""

    plan: Plan
    tile: Plan | None = None
    members: int = attention.MEMBERS
    items: int = prefix.ITEMS

    def __str__(self) -> str:
        cut = f"{self.plan.rows}x{self.plan.keys}" if self.plan.rows else f"keys {self.plan.keys}"
        name = f"{cut} warps {self.plan.warps} stages {self.plan.stages}{' dense' * self.plan.dense}"
        if self.tile:
            t = self.tile
            name += f" | {t.rows}x{t.keys} warps {t.warps} stages {t.stages} members {self.members} items {self.items}"
        return name


def usual(case: Case) -> Iterator[Try]:
    """As serving launches it."""
    q: Any = torch.empty(1, 1, case.heads.dim, dtype=case.dtype, device="cuda")
    prefill = attention.prefill_plan(q, case.eight)
    if any(new > 1 for _, new in case.seqs):
        yield Try(prefill)
    if any(new == 1 for _, new in case.seqs):
        yield Try(attention.decode_plan(q, splits_of(case), case.eight), prefill if case.groups else None)


def ways_of(case: Case) -> Iterator[Try]:
    """To be timed; the first is as serving has it."""
    if case.groups:
        yield from tiles(case)
        return
    yield from usual(case)
    if case.eight and case.seqs[0][1] == 1:
        for keys, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)):
            yield from (Try(Plan(keys, warps, stages)) for stages in (2, 3))


def tiles(case: Case) -> Iterator[Try]:
    """Ways to read shared keys; the first does not know of them."""
    q: Any = torch.empty(1, 1, case.heads.dim, dtype=case.dtype, device="cuda")
    plan = attention.decode_plan(q, splits_of(case), case.eight)
    yield Try(plan)
    for rows, keys, warps, stages in (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 4),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 4, 2),
    ):
        for items in (16, 32, 64):
            yield Try(plan, Plan(keys, warps, stages, rows), rows // 4, items)
    yield Try(Plan(64, 4), Plan(64, 4, 3, 64))


def splits_of(case: Case) -> int:
    return splits_for(len(case.seqs) * case.heads.kv, PROCESSORS)


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
    for s in np.flatnonzero(kv > case.common) if case.groups else ():
        pages[s, : case.common // case.page] = pages[s % case.groups, : case.common // case.page]
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
    wide = [[make(shape, device="cuda", dtype=case.dtype) for _ in range(2)] for _ in range(layers)]
    caches = [(k.to(case.held), v.to(case.held)) for k, v in wide]
    del wide
    q, k, v = qkv.split([heads.q, heads.kv, heads.kv], dim=1)
    slots = torch.from_numpy(batch.slots).cuda()
    for pair in caches if fill else ():
        held = write(k, v, pair, slots)
    if fill:
        k, v = held
    return Data(q, k, v, caches, batch)


def paged(case: Case, batch: HostBatch, way: Try) -> Paged:
    attention.MEMBERS, prefix.MEMBERS, prefix.ITEMS = way.members, way.members, way.items
    at = upload(batch, case.page, tile_rows(case, way), splits_of(case), torch.device("cuda"))[0].paged
    if way.tile and not at.shared:
        raise ValueError("nothing is shared")
    return at if way.tile else replace(at, shared=None)


def tile_rows(case: Case, way: Try) -> int:
    """A float8 cache's tiles are cut for float32."""
    return attention.tile_rows(case.heads.dim, 1) if case.eight else way.plan.rows or 64


def launch(case: Case, x: Data, way: Try) -> Callable[[], torch.Tensor]:
    """Once for every layer; the last one's output [T,Hq,D]."""
    out, at = torch.zeros_like(x.q, memory_format=torch.contiguous_format), paged(case, x.batch, way)

    def run() -> torch.Tensor:
        for pair in x.caches:
            kv = attention.readable(pair[0]), attention.readable(pair[1])
            if way.plan.rows:
                attention.launch_prefill(x.q, x.k, x.v, kv, out, at, case.spec, way.plan)
            else:
                attention.launch_decode(x.q, kv, out, at, case.spec, way.plan, way.tile)
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
        k, v = (c.to(case.dtype).flatten(0, 1)[slots].double().repeat_interleave(group, 1) for c in x.caches[0])
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
    for c in map(movable, x.caches[0]):
        kept = c.flatten(0, 1)[mine]
        c.fill_(0x7F if case.eight else torch.nan)
        c.flatten(0, 1)[mine] = kept


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


def launched(case: Case, x: Data, way: Try) -> torch.Tensor:
    return launch(case, x, way)()


def named(cases: tuple[Case, ...], only: str) -> Iterator[Case]:
    return (case for case in cases if only in case.name)


def check(only: str) -> None:
    bad = count = 0
    for case in named(CHECKS, only):
        x, want = prepared(case)
        ways = list(usual(case))
        if case.name == "plain" and case.groups:
            ways += tiles(case)
        for way in ways:
            name = f"{case.name}{' shared' * (case.groups > 0)}: {way}"
            got = tried(name, partial(launched, case, x, way))
            worst = torch.inf if got is None else error(x, got, want, not way.plan.rows)
            bound = 6e-3 if case.dtype == torch.bfloat16 else 1e-5
            if worst > bound:
                print(f"WRONG   {name}: relative error {worst:.1e}, bound {bound:.0e}", flush=True)
            bad, count = bad + (worst > bound), count + 1
    print(f"checks: {bad} of {count} wrong", flush=True)


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


def measure(only: str) -> None:
    for case in named(MEASURED, only):
        x = data_of(case, max(1, min(32, -(-CACHED // case.kv_bytes))), True)
        found = []
        for way in ways_of(case):
            took = tried(f"{case.name}: {way}", partial(timed, case, x, way))
            if took is not None:
                took /= len(x.caches)
                found.append((took, f"{took * 1e6:8.1f} us {rate(case, took)}  {way}"))
        first = [line for _, line in found[:1]]
        print("\n  ".join([f"\n{case.name}", *first, *(line for _, line in sorted(found[1:])[:10])]), flush=True)


def timed(case: Case, x: Data, way: Try) -> float:
    return seconds(launch(case, x, way))


def rate(case: Case, took: float) -> str:
    if case.seqs[0][1] > 1:
        return f"{case.flops / took / 1e12:6.0f} TFLOP/s"
    return f"{case.kv_bytes / took / 1e12:6.2f} TB/s"


def compile_one(job: tuple[Case, Try]) -> str:
    """Compiles what the launch needs into the cache on disk, and runs nothing."""
    case, way = job
    try:
        JITFunction.run = compiling()
        x = data_of(case, 1, False)
        launch(case, x, way)()
    except Exception as e:
        return f"NO CODE {case.name} {way}: {type(e).__name__} {str(e)[:200]}"
    return ""


@cache
def compiling() -> Any:
    run = JITFunction.run
    return lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)


def build(workers: int, only: str) -> None:
    start = time.perf_counter()
    ways = [(case, way) for case in named(CHECKS, only) for way in usual(case)]
    ways += [(case, way) for case in named(MEASURED, only) for way in ways_of(case) if way.items == prefix.ITEMS]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        for problem in pool.imap_unordered(compile_one, ways):
            if problem:
                print(problem, flush=True)
    print(f"{len(ways)} launches compiled in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    build(args.workers, args.only)
    for part in (check, measure):
        process = multiprocessing.get_context("spawn").Process(target=part, args=(args.only,))
        process.start()
        process.join()
        if process.exitcode:
            print(f"{part.__name__} ended with {process.exitcode}", flush=True)


if __name__ == "__main__":
    main()
