"""L1: sampling, the same logits and the same parameters give the same token; and log probabilities."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from polyradix.backend.batch import Adjust, SampleBatch
from polyradix.backend.protocol import Heads, Params
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.inputs import Part, Ragged, values
from polyradix_conformance.oracle import EXACT, Arr, SampleRow
from polyradix_conformance.rig import Mismatch, Rig, same
from polyradix_conformance.tolerance import floor

VOCAB = 203
WORDS = -(-VOCAB // 32)


@cache
def table(dtype: str) -> Arr:
    """Logits of 64 rows, with ties at the top of the first few."""
    x = values("logits", (64, VOCAB), dtype) * 2
    x[:4, [7, 90, 202]] = 9.0
    return x


def rows() -> list[SampleRow]:
    """A grid of parameters, with seeds and positions over the whole range of 32 bits."""
    grid = product((0.0, 0.5, 1.0), (0, 1, 7, 500), (1.0, 0.9, 0.3), (0.0, 0.05))
    seeds = (0, -1, 12345, 2**31 - 1, -(2**31))
    return [
        SampleRow(t, k, p, m, seeds[n % len(seeds)] + (n if n % len(seeds) == 2 else 0), n * 37 % 4001)
        for n, (t, k, p, m) in enumerate(grid)
    ]


def batch_of(picked: list[SampleRow]) -> SampleBatch:
    mask = None
    if picked[0].allowed is not None:
        bits = np.zeros((len(picked), WORDS * 32), np.uint8)
        for s, row in enumerate(picked):
            bits[s, list(row.allowed or ())] = 1
        mask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    column: dict[str, Any] = {
        name: np.array([getattr(r, name) for r in picked], np.float32 if name in FLOATS else np.int32)
        for name in (*FLOATS, "top_k", "seed", "position")
    }
    return SampleBatch(**column, mask=mask, adjust=adjust_of(picked))


def adjust_of(picked: list[SampleRow]) -> Adjust | None:
    """In no order."""
    entries = [(s, *entry) for s, row in enumerate(picked) for entry in row.adjust]
    if not entries:
        return None
    row, id, factor, add = zip(*(entries[n] for n in np.random.default_rng(5).permutation(len(entries))), strict=True)
    i32, f32 = np.int32, np.float32
    return Adjust(np.array(row, i32), np.array(id, i32), np.array(factor, f32), np.array(add, f32))


def greedy_batch(count: int) -> SampleBatch:
    return batch_of([SampleRow(0.0, 0, 1.0, 0.0, 0, 0)] * count)


FLOATS = ("temperature", "top_p", "min_p")


class Sampler:
    """The rows of a table [64,VOCAB] as logits on the device, sampled."""

    def __init__(self, rig: Rig, x: Arr | None = None) -> None:
        self.rig = rig
        self.x = table(rig.dtype) if x is None else x
        padded = np.pad(self.x, ((0, 0), (0, 208 - VOCAB)))
        head = rig.pack("logits", np.eye(VOCAB, 208))
        self.run = rig.compile(_pick, Params({"x": rig.pack("embed", padded), "head": head}, []))

    def logits(self, ids: list[int]) -> Any:
        """[len(ids), V] on the device: each row is a sequence of one token."""
        ragged = Ragged((1,) * len(ids), self.rig.page)
        _, kv = self.rig.kv(ragged.num_pages, Heads(1, 1, 64))
        batch = ragged.batch([Part(s, 0, 1) for s in range(len(ids))])
        batch.tokens[:] = ids
        return self.run(kv, batch)[0]

    def tokens(self, ids: list[int], picked: list[SampleRow]) -> list[int]:
        out = self.rig.backend.sample(self.logits(ids), batch_of(picked))
        return [int(t) for t in self.rig.fetch(out, (len(ids),))]

    def check(self, ids: list[int], picked: list[SampleRow]) -> list[int]:
        got = self.tokens(ids, picked)
        for i, row, token in zip(ids, picked, got, strict=True):
            want = oracle.sample(self.x[i], row)
            if token not in want:
                raise Mismatch(f"sampled {token} from logits row {i} with {row}; expected {sorted(want)}")
        return got


def _pick(ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
    return ops.logits(ops.last(ops.embed(params.top["x"], m), m), params.top["head"]), kv


def sample(rig: Rig) -> None:
    sampler, grid = Sampler(rig), rows()
    for at in range(0, len(grid), 32):
        picked = grid[at : at + 32]
        sampler.check([(at + n) % 64 for n in range(len(picked))], picked)


def greedy(rig: Rig) -> None:
    """All rows greedy, ties to the lowest id: backends have a path of their own for it."""
    Sampler(rig).check(list(range(64)), [SampleRow(0.0, 0, 1.0, 0.0, n, n) for n in range(64)])


def filters(rig: Rig) -> None:
    """Each filter takes what the one before it left: many seeds, of one distribution that is nearly flat."""
    sampler = Sampler(rig, table(rig.dtype) / 8)
    for k, p, m in ((20, 0.5, 0.0), (0, 0.5, 0.0), (8, 1.0, 0.9), (20, 0.5, 0.9)):
        sampler.check([9] * 64, [SampleRow(1.0, k, p, m, seed, 5) for seed in range(64)])


def seeds(rig: Rig) -> None:
    """One distribution, many seeds: the noise depends on the seed and the position, and on nothing else."""
    sampler = Sampler(rig)
    picked = [SampleRow(1.0, 0, 1.0, 0.0, n // 2 - 5, 100 * (n % 2)) for n in range(24)]
    got = sampler.check([9] * 24, picked)
    if len(set(got)) < 6:
        raise Mismatch(f"24 seeds and positions gave {len(set(got))} different tokens")
    same("the rows in reverse order", sampler.tokens([9] * 24, picked[::-1]), got[::-1])


def mask(rig: Rig) -> None:
    """A random half of the ids; one id alone, in the first and in the last word; and all of them."""
    r = np.random.default_rng(4)
    grid = [row for row in rows() if row.top_k != 500][:40]
    allowed = [tuple(int(i) for i in np.flatnonzero(r.random(VOCAB) < 0.5)) for _ in grid]
    allowed[:4] = [(0,), (VOCAB - 1,), (31, 32), tuple(range(VOCAB))]
    picked = [replace(row, allowed=ids) for row, ids in zip(grid, allowed, strict=True)]
    Sampler(rig).check([n % 64 for n in range(len(picked))], picked)


def adjust(rig: Rig) -> None:
    """Of logits above and below zero: each part alone, and together; with a mask; many in one row, none in others. What
    was likely becomes unlikely, and the other way round, greedy rows included."""
    sampler, grid = Sampler(rig), rows()[:48]
    r = np.random.default_rng(6)
    picked = []
    for n, row in enumerate(grid):
        best = np.argsort(-sampler.x[n], kind="stable")
        ids = [int(i) for i in (*best[: 1 + n % 5], *best[-3:])]  # the best and the worst: of either sign
        factor = [2.0 if n % 3 != 1 else 1.0] * len(ids)
        add = [float(v) * (n % 3 > 0) for v in r.choice([-100.0, -1.5, 0.25, 9.0], len(ids))]
        picked.append(replace(row, adjust=() if n % 7 == 6 else tuple(zip(ids, factor, add, strict=True))))
    ids = list(range(len(picked)))
    sampler.check(ids, picked)
    sampler.check(ids, [replace(row, temperature=0.0) for row in picked])
    odd = tuple(range(1, VOCAB, 2))
    sampler.check(ids, [replace(row, allowed=odd) for row in picked])


def logprobs_after_sampling(rig: Rig) -> None:
    """Temperature, mask and adjust change what is sampled, not its log probability."""
    sampler, ids = Sampler(rig), list(range(8, 40))
    odd = tuple(range(1, VOCAB, 2))
    picked = [SampleRow((0.0, 0.5, 2.0)[i % 3], 0, 1.0, 0.0, i, i, odd, ((5, 2.0, 3.0),)) for i in ids]
    logits = sampler.logits(ids)
    tokens = rig.backend.sample(logits, batch_of(picked))
    got = rig.fetch(rig.backend.logprobs(logits, tokens, 1).chosen, (len(ids),))
    chosen = rig.fetch(tokens, (len(ids),)).astype(int)[:, None]
    truth, *others = (oracle.logprobs(p, sampler.x[ids]) for p in (EXACT, *oracle.emulated(rig.dtype)))
    want = np.take_along_axis(truth, chosen, axis=1)
    rig.close("logprobs of the chosen", got[:, None], want, floor(truth, others, "float32"))


def logprobs(rig: Rig) -> None:
    sampler, ids, top = Sampler(rig), list(range(0, 64, 3)), 5
    logits = sampler.logits(ids)
    out = rig.backend.logprobs(logits, rig.backend.sample(logits, greedy_batch(len(ids))), top)
    x = sampler.x[ids]
    truth, *others = (oracle.logprobs(p, x) for p in (EXACT, *oracle.emulated(rig.dtype)))
    floors = floor(truth, others, "float32")
    order = np.argsort(-x, axis=1, kind="stable")[:, :top]
    best = rig.fetch(out.ids, order.shape).astype(int)  # of equal ones, any may come first, and each only once
    same("logits of the best", np.take_along_axis(x, best, axis=1), np.take_along_axis(x, order, axis=1))
    same("different ids", [len(set(row)) for row in best.tolist()], [top] * len(ids))
    want = np.take_along_axis(truth, order, axis=1)
    rig.close("logprobs of the best", rig.fetch(out.values, order.shape), want, floors)
    rig.close("logprobs of the chosen", rig.fetch(out.chosen, (len(ids),))[:, None], want[:, :1], floors)


for dtype in ("float32", "bfloat16"):
    case("L1/sample/grid", dtype, sample)
    case("L1/sample/greedy", dtype, greedy)
    case("L1/sample/filters", dtype, filters)
    case("L1/sample/seeds", dtype, seeds)
    case("L1/sample/mask", dtype, mask, features=("mask",))
    case("L1/sample/adjust", dtype, adjust, features=("mask", "adjust"))
    case("L1/logprobs", dtype, logprobs, features=("logprobs",))
    case("L1/logprobs/after_sampling", dtype, logprobs_after_sampling, features=("logprobs", "mask", "adjust"))
