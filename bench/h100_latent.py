"""Latent attention on one GPU, in DeepSeek-V2-Lite's numbers: both forms against float64, then their times, and
those of other plans.

    python bench/h100_latent.py

Decode is timed as serving launches it (norm, rope and write included), expanded decode with keys and values of all
heads made anew. Times are of captured launches over caches that together exceed L2. TB/s counts each cached row once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import LatentSpec, LatentWeights
from polyradix_torch.triton import latent, latent_prefix, prefix
from polyradix_torch.triton.attention import Plan
from polyradix_torch.triton.capture import splits_for
from polyradix_torch.triton.latent import Rows
from polyradix_torch.triton.ops import GpuMeta
from polyradix_torch.triton.tune import microseconds
from polyradix_torch.triton.upload import upload

SPEC = LatentSpec(16, 512, 128, 64, 128, 192**-0.5, 1e-6)
WIDTH, PAGE, CACHED = 576, 16, 256 << 20
GPU = torch.device("cuda")
DECODES = ((1, 256), (1, 4096), (8, 4096), (32, 4096), (64, 256), (64, 4096), (256, 640))  # sequences, keys of each
PREFILLS = ((2, 0, 4096), (16, 0, 512), (16, 2048, 64), (2, 4096, 4096))  # sequences, cached, new
SHARED = (
    (8, 32, 2048, 96),
    (4, 16, 2048, 96),
    (1, 16, 4096, 96),
    (1, 8, 8192, 96),
    (1, 64, 576, 96),
)  # groups, members of each, keys in common, own keys
TILES = (
    Plan(64, 8, 3, 64), Plan(32, 8, 3, 64), Plan(64, 8, 2, 64), Plan(16, 8, 3, 64), Plan(32, 8, 3, 32),
    Plan(64, 8, 2, 32), Plan(64, 4, 2, 32),
)  # fmt: skip
PLANS = (
    Plan(32, 4, 5), Plan(32, 4, 3), Plan(32, 8, 5), Plan(32, 8, 3), Plan(16, 4, 5), Plan(64, 8, 2), Plan(64, 4, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    batch: HostBatch
    q: torch.Tensor
    c: torch.Tensor
    caches: list[torch.Tensor]
    weights: LatentWeights


def data(seqs: int, old: int, new: int, most: int = CACHED, groups: int = 0, common: int = 0) -> Data:
    """Pages in random order; those of the first `common` keys are the same in each of the groups."""
    length, rows = old + new, seqs * new
    each = -(-length // PAGE)
    pages = np.random.default_rng(0).permutation(seqs * each).reshape(seqs, each).astype(np.int32) + 1
    for g in range(groups):
        pages[g::groups, : common // PAGE] = pages[g, : common // PAGE]
    positions = np.tile(np.arange(old, length, dtype=np.int32), seqs)
    slots = pages[np.repeat(np.arange(seqs), new), positions // PAGE] * PAGE + positions % PAGE
    cu_q = np.arange(0, rows + 1, new, dtype=np.int32)
    lengths = np.full(seqs, length, np.int32)
    batch = HostBatch(positions, positions, slots, cu_q, lengths, pages, cu_q[1:] - 1, np.full(rows, -1, np.int32))
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=GPU)

    angles = torch.arange(length, device=GPU)[:, None] * 1e4 ** -(torch.arange(32, device=GPU) / 32)
    weights = LatentWeights(
        torch.ones(512, device=GPU), normal(16, 256, 512) / 23, torch.cat([angles.cos(), angles.sin()], 1)
    )
    count = max(1, min(32, most // (seqs * each * PAGE * WIDTH * 2)))
    caches = [normal(seqs * each + 1, PAGE, 1, WIDTH) for _ in range(count)]
    return Data(batch, normal(rows, 16 * 192), normal(rows, WIDTH), caches, weights)


def meta(x: Data, splits: int) -> GpuMeta:
    return upload(x.batch, PAGE, latent.tile_rows(2), splits, GPU, absorb=True)[0]


def expanding(m: GpuMeta, x: Data) -> GpuMeta:
    """A decode whose sequences are expanded as a prefill's are."""
    seqs = x.batch.num_seqs
    s = torch.arange(seqs, dtype=torch.int32, device=GPU)
    none, lengths = s[:0], x.batch.kv_len
    begin, zero = np.cumsum(lengths) - lengths, 0 * lengths
    runs, starts = np.column_stack([zero, zero, lengths, begin]), np.column_stack([zero, zero, begin])
    runs[:, 0] = np.arange(seqs)
    rows = Rows(
        none,
        none.view(0, 3),
        *(torch.from_numpy(x.astype(np.int32)).to(GPU) for x in (runs, starts)),
        int(lengths.sum()),
        int(lengths.max()),
    )
    return replace(m, paged=replace(m.paged, single=none, tiles=torch.stack([s, s * 0], 1)), latent=rows)


def run(x: Data, m: GpuMeta, cache: torch.Tensor) -> torch.Tensor:
    return latent.attend(x.q, x.c, cache, m.positions, m.slots, m.paged, m.latent, x.weights, SPEC)


def expected(x: Data, cache: torch.Tensor) -> torch.Tensor:
    """In float64, absorbed by hand, from a cache in which the new rows are already."""
    out, b = [], x.batch
    table, up = x.weights.table.double(), x.weights.up.double()
    for s in range(b.num_seqs):
        n = int(b.kv_len[s])
        at = np.arange(n)
        slots = torch.from_numpy(b.pages[s, at // PAGE] * PAGE + at % PAGE).to(GPU).long()
        rows = cache.view(-1, WIDTH)[slots].double()
        q = x.q[int(b.cu_q[s]) : int(b.cu_q[s + 1])].double().view(-1, 16, 192)
        cos, sin = table[n - len(q) : n, None].chunk(2, -1)
        a, e = q[..., 128:].chunk(2, -1)
        turned = torch.cat([a * cos - e * sin, e * cos + a * sin], -1)
        query = torch.cat([torch.einsum("thn,hnr->thr", q[..., :128], up[:, :128]), turned], -1)
        score = torch.einsum("thr,kr->htk", query, rows) * SPEC.scale
        seen = torch.arange(n, device=GPU)[None, :] <= torch.arange(n - len(q), n, device=GPU)[:, None]
        p = score.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("htk,kr,hvr->thv", p, rows[:, :512], up[:, 128:]).flatten(1))
    return torch.cat(out)


def check() -> None:
    for seqs, old, new in ((5, 300, 1), (3, 100, 7), (3, 37, 200)):
        x = data(seqs, old, new, 1)
        found = {"": meta(x, 4)}
        if new == 1:
            found |= {" expanded": expanding(found[""], x), " in one part": meta(x, 1)}
        for name, m in found.items():
            got = run(x, m, x.caches[0])
            want = expected(x, x.caches[0])
            error = float((got.double() - want).norm() / want.norm())
            print(f"{'ok' if error < 8e-3 else 'WRONG'}: {seqs} x ({old} + {new}){name}: relative error {error:.1e}")


def decodes() -> None:
    for seqs, keys in DECODES:
        x = data(seqs, keys - 1, 1)
        calls, read = max(8, 2 * len(x.caches)), seqs * keys * WIDTH * 2
        splits = splits_for(seqs, torch.cuda.get_device_properties(GPU).multi_processor_count)
        took = microseconds(partial(run, x, meta(x, splits)), x.caches, calls)
        print(f"decode {seqs} x {keys}: absorbed {took:.1f} us, {read / took / 1e6:.2f} TB/s", end="")
        other = microseconds(partial(run, x, expanding(meta(x, splits), x)), x.caches, calls)
        print(f"; expanded {other:.1f} us, {other / took:.1f} times that", flush=True)
        usual, times = latent.DECODE[2, 16], {}
        for plan in PLANS:
            for parts in {splits, max(1, splits // 2), min(latent.MOST_SPLITS, 2 * splits)}:
                latent.DECODE[2, 16] = plan
                try:
                    times[plan, parts] = microseconds(partial(run, x, meta(x, parts)), x.caches, calls)
                except Exception as e:
                    print(f"  {plan}: {type(e).__name__} {str(e)[:100]}")
        latent.DECODE[2, 16] = usual
        for plan, parts in sorted(times, key=times.__getitem__)[:4]:
            print(
                f"  keys {plan.keys} warps {plan.warps} stages {plan.stages} parts {parts}: {times[plan, parts]:.1f} us"
            )


def shared() -> None:
    """Decodes whose first rows are shared: read once, whether that pays or not, and as if they were not."""
    prefix.LEAST_SAVED_LATENT = 0
    for groups, members, common, own in SHARED:
        seqs = groups * members
        x = data(seqs, common + own - 1, 1, groups=groups, common=common)
        calls = max(8, 2 * len(x.caches))
        m = meta(x, splits_for(seqs, torch.cuda.get_device_properties(GPU).multi_processor_count))
        if m.paged.shared is None:
            print(f"{groups} x {members} x ({common} + {own}): not shared")
            continue
        alone = replace(m, paged=replace(m.paged, shared=None))
        for name, one in (("", m), (" alone", alone)):
            got = run(x, one, x.caches[0])
            want = expected(x, x.caches[0])
            error = float((got.double() - want).norm() / want.norm())
            took = microseconds(partial(run, x, one), x.caches, calls)
            print(
                f"{groups} x {members} x ({common} + {own}){name}: {took:.1f} us, relative error {error:.1e}",
                flush=True,
            )
        usual = latent_prefix.SHARED[2]
        for plan in TILES:
            latent_prefix.SHARED[2] = usual[0], plan
            try:
                took = microseconds(partial(run, x, m), x.caches, calls)
                print(f"  queries {plan.rows} keys {plan.keys} warps {plan.warps} stages {plan.stages}: {took:.1f} us")
            except Exception as e:
                print(f"  {plan}: {type(e).__name__} {str(e)[:100]}")
        latent_prefix.SHARED[2] = usual


def prefills() -> None:
    for seqs, old, new in PREFILLS:
        x = data(seqs, old, new)
        pairs = seqs * new * (old + (new + 1) / 2)
        usual = latent.PREFILL[2]
        for rows, warps, keys in ((128, 8, 64), (64, 4, 64), (128, 8, 32), (64, 4, 32), (128, 4, 64), (128, 8, 128)):
            latent.PREFILL[2] = rows, warps, keys, keys
            try:
                took = microseconds(partial(run, x, meta(x, 4)), x.caches, 8)
            except Exception as e:
                print(f"  {rows}x{keys}: {type(e).__name__} {str(e)[:100]}")
                continue
            rate = pairs * 16 * 640 / took / 1e6
            print(
                f"prefill {seqs} x ({old} + {new}), {rows} x {keys}, {warps} warps: {took:.0f} us, {rate:.0f} TFLOP/s"
            )
        latent.PREFILL[2] = usual


if __name__ == "__main__":
    with torch.inference_mode():
        check()
        shared()
        decodes()
        prefills()
