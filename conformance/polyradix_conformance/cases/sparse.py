"""L1, L2 and L5: the verb attend_sparse against the oracle, and the keys it caches. L4: models, batch against batch.

What the indexer is given is chosen so that every step to a score is exact in every dtype: small integers, keys whose
mean and variance are powers of two, quarter turns. So all backends have the same scores, ties are ties, and only one
selection is right. Caches are checked with random keys.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import numpy as np

from polyradix.backend.protocol import Index, IndexSpec, KVSpec, LatentSpec, LatentWeights
from polyradix_conformance import oracle
from polyradix_conformance.cases import case, mla
from polyradix_conformance.cases.moe import batches
from polyradix_conformance.golden import families, load
from polyradix_conformance.inputs import Part, Ragged, ragged_lengths, values
from polyradix_conformance.oracle import EXACT, Arr, Precision
from polyradix_conformance.oracle_mla import Latent, Weights, attend
from polyradix_conformance.oracle_sparse import Indexer, Inputs, keys, selected
from polyradix_conformance.rig import Rig, same
from polyradix_conformance.tolerance import floor

PLAIN = Indexer()
FLAT = replace(mla.PLAIN, scale=0.05)  # no row weighs so little that it could be another
WIDE = Latent(2, 512, 128, 64, 128, 0.02)
SHAPES: dict[str, tuple[Latent, Indexer]] = {
    "one-head": (FLAT, replace(PLAIN, heads=1)),
    "all-turned": (FLAT, replace(PLAIN, dim=FLAT.rope)),
    "temperature": (replace(FLAT, attn_scale=0.5, floor_scale=5), PLAIN),
    "top-1": (FLAT, replace(PLAIN, top_k=1)),
    "all-seen": (FLAT, replace(PLAIN, top_k=mla.LONGEST)),
}
REGIMES = ("ties", "spread", "equal", "random")


@cache
def inputs(dtype: str, s: Indexer, regime: str, rows: int) -> Inputs:
    """`ties`: most scores are equal to others; `spread`: few are; `equal`: all are. `random` ones are not exact."""
    r = np.random.default_rng(zlib.crc32(f"index {s} {regime} {rows}".encode()))
    most = {"ties": 1, "spread": 5, "equal": 0, "random": 1}[regime]
    q = r.integers(-most, most + 1, (rows, s.heads * s.dim)).astype(float)
    signs = r.permuted(np.tile([-1.0, 1.0], (rows, s.dim // 2)), axis=1)
    k = signs * r.choice([0.5, 1.0, 2.0], (rows, 1)) + r.integers(-3, 4, (rows, 1))
    weights = r.integers(-(most**2), 2 * most**2 + 1, (rows, s.heads))
    norm, bias = r.choice([0.5, 1.0, 2.0], s.dim), r.integers(-1, 2, s.dim).astype(float)
    if regime == "random":
        k = values(f"index k {s} {rows}", k.shape, dtype)
        norm, bias = (values(f"index {name} {s}", (s.dim,), dtype) for name in ("norm", "bias"))
    return Inputs(q, k, weights.astype(float), norm, bias)


@cache
def weights(dtype: str, a: Latent) -> Weights:
    """Column pair i makes i + 1 quarter turns a position."""
    quarters = np.arange(mla.LONGEST)[:, None] * np.arange(1, a.rope // 2 + 1) % 4
    table = np.concatenate([np.array([1.0, 0, -1, 0])[quarters], np.array([0.0, 1, 0, -1])[quarters]], axis=1)
    return replace(mla.weights(dtype, a), table=table)


@cache
def expected(
    dtype: str, a: Latent, s: Indexer, regime: str, lengths: tuple[int, ...], newest: int | None = None
) -> tuple[Arr, Arr]:
    """Truth [rows,H,v] and floors [rows,H], as mla.expected, of the `newest` rows of each sequence."""
    rounding = Precision(np.float64, lambda x: oracle.rounded(x, dtype))
    q, c = mla.inputs(dtype, a, "normal", sum(lengths))
    x, w, truths, floors, at = inputs(dtype, s, regime, sum(lengths)), weights(dtype, a), [], [], 0
    for n in lengths:
        rows, at = slice(at, at + n), at + n
        own = Inputs(x.q[rows], x.k[rows], x.weights[rows], x.norm, x.bias)
        seen = selected(rounding, own, w.table, a.rope, s)[-(newest or n) :]
        part = q[rows][-len(seen) :], c[rows]
        truth = attend(EXACT, *part, w, a, False, seen)
        others = [attend(p, *part, w, a, form, seen) for p in oracle.emulated(dtype) for form in (False, True)]
        truths.append(truth)
        floors.append(np.tile(floor(truth, others, dtype).max(axis=0), (len(seen), 1)))
    return np.concatenate(truths), np.concatenate(floors)


class Stream(mla.Stream):
    """As mla.Stream, over the rows that the indexer selects."""

    def __init__(
        self, rig: Rig, ragged: Ragged, a: Latent = FLAT, s: Indexer = PLAIN, regime: str = "ties", layers: int = 1
    ) -> None:
        self.s, self.x = s, inputs(rig.dtype, s, regime, ragged.rows)
        super().__init__(rig, ragged, a, regime, layers)

    def columns(self) -> dict[str, Arr]:
        q, c = mla.inputs(self.rig.dtype, self.a, "normal", self.ragged.rows)
        return {"q": q, "c": c, "index_q": self.x.q, "index_k": self.x.k, "weights": self.x.weights}

    def more(self) -> dict[str, Any]:
        table = weights(self.rig.dtype, self.a).table
        return {"index_norm": self.rig.pack("norm", self.x.norm, self.x.bias), "table": self.rig.pack("rope", table)}

    def cache_spec(self) -> KVSpec:
        spec = super().cache_spec()
        return replace(spec, head_dim=spec.head_dim + self.s.dim, index=self.s.dim)

    def expected(self) -> tuple[Arr, Arr]:
        return expected(self.rig.dtype, self.a, self.s, self.regime, self.ragged.lengths)

    def attend(self, ops: Any, each: dict[str, Any], top: dict[str, Any], kv: Any, m: Any) -> Any:
        index = Index(each["index_q"], each["index_k"], each["weights"], top["index_norm"])
        w, specs = LatentWeights(top["norm"], top["up"], top["table"]), (self.a, self.s)
        a, s = LatentSpec(**asdict(specs[0])), IndexSpec(**asdict(specs[1]))
        return ops.attend_sparse(each["q"], each["c"], index, kv, m, w, a, s)


def attention(
    rig: Rig,
    plan: str,
    a: Latent = FLAT,
    s: Indexer = PLAIN,
    regime: str = "ties",
    page: int | None = None,
    layers: int = 1,
    lengths: tuple[int, ...] = (),
) -> None:
    page = page or rig.page
    ragged = Ragged(lengths or ragged_lengths(page), page)
    Stream(rig, ragged, a, s, regime, layers).check(getattr(ragged, plan)())


def long(rig: Rig) -> None:
    """The last tokens of a long sequence, of which a small part is seen."""
    n, new, s = 700, 3, replace(PLAIN, top_k=64)
    stream = Stream(rig, Ragged((n,), rig.page), s=s, regime="spread")
    for start in range(0, n - new, 200):
        stream.step([Part(0, start, min(start + 200, n - new))])
    truth, floors = expected(rig.dtype, FLAT, s, "spread", (n,), new)
    rig.close("attend_sparse", stream.step([Part(0, n - new, n)]), truth[-1:], floors[-1:])


def written(rig: Rig) -> None:
    """Every token's key is normed, turned and behind its row, which is that of latent attention."""
    s = replace(PLAIN, eps=0.5)
    stream = Stream(rig, Ragged(ragged_lengths(rig.page), rig.page), s=s, regime="random", layers=2)
    for parts in stream.ragged.chunked():
        stream.step(parts)
    got, at, x, table = stream.rows(), 0, stream.x, weights(rig.dtype, FLAT).table
    for n in stream.ragged.lengths:
        own = Inputs(x.q[:0], x.k[at : at + n], x.weights[:0], x.norm, x.bias)
        truth, *others = (keys(p, own, table, FLAT.rope, s) for p in (EXACT, *oracle.emulated(rig.dtype)))
        floors = np.full(n, floor(truth, others, rig.dtype).max())
        for layer in range(2):
            rig.close(f"keys of layer {layer}", got[layer, at : at + n, -s.dim :], truth, floors)
        at += n


def moved(rig: Rig) -> None:
    """Pages exported and imported elsewhere bring their keys along."""
    lengths = ragged_lengths(rig.page)
    here, there = (Stream(rig, Ragged(lengths, rig.page, seed), layers=2) for seed in (0, 1))
    head, tail = here.ragged.decode()
    here.step(head)
    source, target = (np.concatenate(s.ragged.pages).tolist() for s in (here, there))
    data = rig.export(here.kv, source)
    there.kv = rig.backend.import_pages(there.kv, target, data)
    same("the import", rig.export(there.kv, target), data)
    there.checked_step("decoding from imported pages", tail)


def add(name: str, dtype: str, body: Callable[[Rig], None], page: int | None = None, tp: int = 1) -> None:
    case(name, dtype, body, 0, ("indexer", "mla"), page, tp, "sparse")


for dtype in ("float32", "bfloat16"):
    for plan in ("whole", "decode", "chunked", "mixed"):
        for regime in REGIMES[:3]:
            add(f"L1/attend_sparse/{plan}/{regime}", dtype, partial(attention, plan=plan, regime=regime))
    for name, (a, s) in SHAPES.items():
        add(f"L1/attend_sparse/{name}", dtype, partial(attention, plan="mixed", a=a, s=s, regime="spread"))
    deepseek = partial(attention, plan="mixed", a=WIDE, s=Indexer(64, 128), regime="spread", lengths=(17, 5))
    add("L1/attend_sparse/deepseek", dtype, deepseek)
    for page in mla.PAGE_SIZES:
        add(f"L1/attend_sparse/page-{page}", dtype, partial(attention, plan="mixed", page=page), page)
    add("L1/attend_sparse/long", dtype, long)
    add("L2/sparse/last-layer", dtype, partial(attention, plan="mixed", layers=3))
    add("L2/sparse/batching", dtype, partial(mla.batching, stream=Stream))
    for state in (written, moved):
        add(f"L2/sparse/{state.__name__}", dtype, state)
    for family in families():
        if (needs := load(family).spec.needs(dtype)).features >= {"indexer"}:
            body, features = partial(batches, family=family), tuple(sorted(needs.features))
            case(f"L4/sparse/batches/{family}", dtype, body, needs.head_dim, features, profile="sparse")
    for tp in (2, 4):
        add(f"L5/attend_sparse/tp-{tp}", dtype, partial(attention, plan="mixed"), tp=tp)
