"""L1, L2 and L5: the verb attend_latent against the oracle, and the cache it fills. L4: models, batch against batch.

Of a batch, the last row of each sequence is compared. The rows between show in whole models, whose later layers read
what was made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import numpy as np

from polyradix.backend.protocol import KVSpec, LatentSpec, LatentWeights, Params
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.cases.moe import batches
from polyradix_conformance.flow import poison
from polyradix_conformance.golden import families, load
from polyradix_conformance.inputs import REGIMES, Part, Ragged, ragged_lengths, values
from polyradix_conformance.oracle import EXACT, Arr
from polyradix_conformance.oracle_mla import Latent, Weights, attend, cached
from polyradix_conformance.rig import Rig, same
from polyradix_conformance.tolerance import floor

PLAIN = Latent()
SHAPES = {
    "one-head": replace(PLAIN, heads=1),
    "many-heads": replace(PLAIN, heads=16, rank=32, nope=16, v=16),
    "equal-parts": replace(PLAIN, nope=32, v=32, rope=32),
    "narrow-values": replace(PLAIN, v=8, rope=64),
    "deepseek": Latent(2, 512, 128, 64, 128, 192**-0.5),
    "kernel-tiles": replace(PLAIN, heads=16, rank=128, nope=64, rope=64, v=64),
}
TEMPERED = replace(PLAIN, attn_scale=0.5, floor_scale=5)
PAGE_SIZES = (1, 8, 16, 32, 64, 128)
LONGEST = 1024


@cache
def weights(dtype: str, a: Latent) -> Weights:
    angles = np.arange(LONGEST)[:, None] * 100.0 ** (-np.arange(0, 1, 2 / a.rope))
    up = values(f"latent up {a}", (a.heads, a.nope + a.v, a.rank), dtype) / np.sqrt(a.rank)
    return Weights(
        norm=oracle.rounded(1 + values("latent norm", (a.rank,), dtype) / 8, dtype),
        up=oracle.rounded(up, dtype),
        table=oracle.rounded(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "float32"),
    )


@cache
def inputs(dtype: str, a: Latent, regime: str, rows: int) -> tuple[Arr, Arr]:
    """q [rows,H*(nope+rope)] and c [rows,R+rope]. The peaked regime makes softmax nearly one-hot."""
    plain = regime.replace("peaked", "normal")
    q = values(f"latent q {a} {rows}", (rows, a.heads * (a.nope + a.rope)), dtype, plain)
    return q * (8 if regime == "peaked" else 1), values(f"latent c {a} {rows}", (rows, a.rank + a.rope), dtype, plain)


def answer(dtype: str, q: Arr, c: Arr, w: Weights, a: Latent) -> tuple[Arr, Arr]:
    """Truth [T,H,v] of one sequence, and floors [T,H], which leave room for both forms."""
    truth = attend(EXACT, q, c, w, a, absorbed=False)
    others = [attend(p, q, c, w, a, absorbed) for p in oracle.emulated(dtype) for absorbed in (False, True)]
    return truth, floor(truth, others, dtype)


@cache
def expected(dtype: str, a: Latent, regime: str, lengths: tuple[int, ...]) -> tuple[Arr, Arr]:
    """Truth [rows,H,v], and floors [rows,H]: per head the largest floor in the sequence."""
    q, c = inputs(dtype, a, regime, sum(lengths))
    truths, floors, at = [], [], 0
    for n in lengths:
        part, w = (q[at : at + n], c[at : at + n]), weights(dtype, a)
        truth, least = answer(dtype, *part, w, a)
        truths.append(truth)
        floors.append(np.tile(least.max(axis=0), (n, 1)))
        at += n
    return np.concatenate(truths), np.concatenate(floors)


class Stream:
    """Sequences going through `layers` layers of latent attention, all with the same inputs, in a poisoned cache."""

    def __init__(self, rig: Rig, ragged: Ragged, a: Latent = PLAIN, regime: str = "normal", layers: int = 1) -> None:
        self.rig, self.ragged, self.a, self.regime, self.layers = rig, ragged, a, regime, layers
        columns = self.columns()
        self.q, self.c = columns["q"], columns["c"]
        w, wide, total = weights(rig.dtype, a), a.heads * a.v, sum(x.shape[1] for x in columns.values())
        top, at = {"x": rig.pack("embed", np.concatenate(list(columns.values()), axis=1))}, 0
        for name, x in columns.items():
            part, at = np.eye(x.shape[1], total, at), at + x.shape[1]
            top[name] = rig.pack("linear", part, segments=(len(part),) if name == "q" else ())
        top |= {
            "zero": rig.pack("linear", np.zeros((wide, total))),
            "norm": rig.pack("norm", w.norm),
            "up": rig.pack("latent_up", w.up),
            "table": rig.pack("rope", w.table),
            "out": rig.pack("linear_reduce", np.eye(wide)),
            "end": rig.pack("logits", np.eye(wide)),
            **self.more(),
        }
        self.run = rig.compile(self._step, Params(top, [{} for _ in range(layers)]))
        self.spec = self.cache_spec()
        kv = rig.backend.alloc_kv(self.spec, ragged.num_pages)
        self.kv = rig.backend.import_pages(kv, range(ragged.num_pages), poison(self.spec, ragged.num_pages))

    def columns(self) -> dict[str, Arr]:
        """What of an input row is what, in order."""
        return dict(zip("qc", inputs(self.rig.dtype, self.a, self.regime, self.ragged.rows), strict=True))

    def more(self) -> dict[str, Any]:
        """Further parameters."""
        return {}

    def cache_spec(self) -> KVSpec:
        a = self.a
        return KVSpec(self.layers, 1, a.rank + a.rope, self.ragged.page, self.rig.dtype, "latent")

    def expected(self) -> tuple[Arr, Arr]:
        return expected(self.rig.dtype, self.a, self.regime, self.ragged.lengths)

    def attend(self, ops: Any, each: dict[str, Any], top: dict[str, Any], kv: Any, m: Any) -> Any:
        """`each`: the columns of the batch."""
        w = LatentWeights(top["norm"], top["up"], top["table"])
        return ops.attend_latent(each["q"], each["c"], kv, m, w, LatentSpec(**asdict(self.a)))

    def step(self, parts: list[Part]) -> Arr:
        """Runs one batch; the last row [H,v] of each part, [S,H,v]."""
        out, self.kv = self.run(self.kv, self.ragged.batch(parts))
        return self.rig.fetch(out, (len(parts), self.a.heads * self.a.v)).reshape(len(parts), self.a.heads, self.a.v)

    def checked_step(self, what: str, parts: list[Part]) -> Arr:
        truth, floors = self.expected()
        at, got = [self.ragged.ids(p)[-1] for p in parts], self.step(parts)
        self.rig.close(what, got, truth[at], floors[at])
        return got

    def check(self, plan: list[list[Part]]) -> None:
        for n, parts in enumerate(plan):
            self.checked_step(f"batch {n}", parts)

    def rows(self) -> Arr:
        """What the cache holds of every token, [layers,rows,R+rope]."""
        each = [
            self.ragged.rows_in(self.rig.export(self.kv, pages.tolist()), Part(s, 0, n))[0, :, :, 0]
            for s, (pages, n) in enumerate(zip(self.ragged.pages, self.ragged.lengths, strict=True))
        ]
        return np.concatenate(each, axis=1)

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        top = params.top
        x = ops.embed(top["x"], m)

        def body(w: dict[str, Any], last: Any, kv: Any) -> Any:
            each = {name: ops.linear(x, top[name]) for name in self.columns()}
            out, kv = self.attend(ops, each, top, kv, m)
            return ops.linear_reduce(out, top["out"]), kv

        out, kv = ops.layers([body] * len(params.layers), params.layers, ops.linear(x, top["zero"]), kv)
        return ops.logits(ops.last(out, m), top["end"]), kv


def attention(
    rig: Rig, plan: str, a: Latent = PLAIN, regime: str = "normal", page: int | None = None, layers: int = 1
) -> None:
    page = page or rig.page
    ragged = Ragged(ragged_lengths(page), page)
    Stream(rig, ragged, a, regime, layers).check(getattr(ragged, plan)())


def every_length(rig: Rig) -> None:
    """Prefills of every length up to 40, so that each row is the last one of some."""
    ragged = Ragged(tuple(range(1, 41)), rig.page)
    Stream(rig, ragged).check(ragged.whole())


def long(rig: Rig) -> None:
    """The last tokens of a sequence longer than the partitions of any kernel; the rest is imported."""
    n, new, w = 1000, 3, weights(rig.dtype, PLAIN)
    stream = Stream(rig, Ragged((n,), rig.page))
    held = oracle.rounded(cached(EXACT, stream.c, w, PLAIN), rig.dtype)
    data, pages = poison(stream.spec, len(stream.ragged.pages[0])), stream.ragged.pages[0].tolist()
    data.reshape(-1, held.shape[1])[: n - new] = held[: n - new].astype(data.dtype)
    stream.kv = rig.backend.import_pages(stream.kv, pages, data)
    truth, floors = answer(rig.dtype, stream.q[-new:], stream.c, w, PLAIN)
    rig.close("attend_latent", stream.step([Part(0, n - new, n)]), truth[-1:], floors[-1:])


def written(rig: Rig) -> None:
    """Every token's row is normed, rotated and in its slot, in every layer; other slots but page 0's are untouched."""
    stream = Stream(rig, Ragged(ragged_lengths(rig.page), rig.page), layers=3)
    for parts in stream.ragged.chunked():
        stream.step(parts)
    lengths, w, at = stream.ragged.lengths, weights(rig.dtype, PLAIN), 0
    got = stream.rows()
    for n in lengths:
        c = stream.c[at : at + n]
        truth, *others = (cached(p, c, w, PLAIN) for p in (EXACT, *oracle.emulated(rig.dtype)))
        for part in (slice(PLAIN.rank), slice(PLAIN.rank, None)):
            floors = floor(truth[:, part], [x[:, part] for x in others], rig.dtype)
            for layer in range(3):
                rig.close(f"rows of layer {layer}", got[layer, at : at + n, part], truth[:, part], floors)
        at += n
    used = np.concatenate([stream.ragged.slots(Part(s, 0, n)) for s, n in enumerate(lengths)])
    free = np.setdiff1d(np.arange(stream.ragged.page, stream.ragged.num_pages * stream.ragged.page), used)
    data = rig.export(stream.kv, range(stream.ragged.num_pages))
    kept = poison(stream.spec, stream.ragged.num_pages)
    same("slots of no token", *(x.reshape(3, -1, x.shape[-1])[:, free] for x in (data, kept)))


def moved(rig: Rig) -> None:
    """Pages exported and imported elsewhere, and copies of pages, serve as the first ones did."""
    lengths = ragged_lengths(rig.page)
    here, there = (Stream(rig, Ragged(lengths, rig.page, seed), layers=2) for seed in (0, 1))
    head, tail = here.ragged.decode()
    here.step(head)
    source, target = (np.concatenate(s.ragged.pages)[::-1].tolist() for s in (here, there))
    data = rig.export(here.kv, source)
    there.kv = rig.backend.import_pages(there.kv, target, data)
    same("the import", rig.export(there.kv, target), data)
    there.checked_step("decoding from imported pages", tail)
    spare = here.ragged.spare[:1]
    here.kv = rig.backend.copy_pages(here.kv, source[:1], spare)
    same("a copy", rig.export(here.kv, spare), data[:, :, :1])


def batching(rig: Rig, stream: Callable[[Rig, Ragged], Stream] = Stream) -> None:
    """Whole, in chunks, alone and in another order: where the backend claims batch invariance, the same bits."""
    ragged = Ragged(ragged_lengths(rig.page), rig.page)
    seen = dict[tuple[int, int], Arr]()
    whole = ragged.whole()[0]
    plans = {
        "whole": [whole],
        "in chunks": ragged.chunked(),
        "with decodes": ragged.mixed(),
        "decoded": ragged.decode(),
        "alone": [[p] for p in whole],
        "in another order": [whole[::-1]],
    }
    for what, plan in plans.items():
        one = stream(rig, ragged)
        for parts in plan:
            for part, row in zip(parts, one.checked_step(what, parts), strict=True):
                want = seen.setdefault((part.seq, part.stop), row)
                if rig.backend.caps.batch_invariant:
                    same(f"{what}: sequence {part.seq} after {part.stop} tokens", row, want)


def add(name: str, dtype: str, body: Callable[[Rig], None], page: int | None = None, tp: int = 1) -> None:
    case(name, dtype, body, features=("mla",), page_size=page, tp=tp, profile="mla")


for dtype in ("float32", "bfloat16"):
    for plan in ("whole", "decode", "chunked", "mixed"):
        for regime in REGIMES:
            body = partial(attention, plan=plan, regime=regime)
            add(f"L1/attend_latent/{plan}/{regime}", dtype, body)
        add(f"L1/attend_latent/{plan}/temperature", dtype, partial(attention, plan=plan, a=TEMPERED))
    for name, shape in SHAPES.items():
        add(f"L1/attend_latent/shape-{name}", dtype, partial(attention, plan="mixed", a=shape))
    for page in PAGE_SIZES:
        add(f"L1/attend_latent/page-{page}", dtype, partial(attention, plan="mixed", page=page), page)
    add("L1/attend_latent/every-length", dtype, every_length)
    add("L1/attend_latent/long", dtype, long)
    add("L2/latent/last-layer", dtype, partial(attention, plan="mixed", layers=3))
    for state in (written, moved, batching):
        add(f"L2/latent/{state.__name__}", dtype, state)
    for family in families():
        if (needs := load(family).spec.needs(dtype)).features >= {"mla"} and "indexer" not in needs.features:
            body, features = partial(batches, family=family), tuple(sorted(needs.features))
            case(f"L4/mla/batches/{family}", dtype, body, needs.head_dim, features, profile="mla")
    for tp in (2, 4):
        add(f"L5/attend_latent/tp-{tp}", dtype, partial(attention, plan="mixed"), tp=tp)
