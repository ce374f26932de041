"""L1 and L2: what must not change, or must change in a known way, when the input does. No answer is known here: two
runs of the backend are compared, bit for bit where it claims batch invariance, else within rounding floors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec, Heads, Params
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.cases.sampling import VOCAB, Sampler
from polyradix_conformance.flow import poison
from polyradix_conformance.inputs import Part, Ragged, values
from polyradix_conformance.oracle import EXACT, Arr, Attention, Precision, SampleRow
from polyradix_conformance.rig import Mismatch, Rig, parts_of, same
from polyradix_conformance.search import search
from polyradix_conformance.tolerance import floor

HEADS = Heads(q=2, kv=1, dim=64)
WIDTH, EPS, PAGES = 64, 1e-5, 9
PLAIN = Attention(0.125)
SEEDS = st.integers(0, 2**32 - 1)
Plan = list[list[Part]]


def lengths_of(rig: Rig) -> tuple[int, ...]:
    return (1, rig.page + 2, 5, rig.page)


@st.composite
def plans(draw: st.DrawFn, lengths: tuple[int, ...]) -> Plan:
    """Batches that run every sequence from its start to its end, cut, delayed and ordered at will."""
    steps: dict[int, list[Part]] = defaultdict(list)
    for seq in draw(st.permutations(range(len(lengths)))):
        end = lengths[seq]
        cuts = draw(st.sets(st.integers(1, end - 1), max_size=3)) if end > 1 else ()
        step = draw(st.integers(0, 2))
        for start, stop in pairwise((0, *sorted(cuts), end)):
            steps[step].append(Part(seq, start, stop))
            step += draw(st.integers(1, 2))
    return [steps[step] for step in sorted(steps)]


@cache
def weights(dtype: str, rows: int) -> dict[str, Arr]:
    """Of a block; its two layers share them."""
    total, out = sum(parts_of(HEADS)), parts_of(HEADS)[0]
    angles = np.outer(np.arange(256), 100.0 ** (-np.arange(32) / 32))
    shapes = {"x": (rows, WIDTH), "qkv": (total, WIDTH), "out": (WIDTH, out), "head": (VOCAB, WIDTH)}
    made = {name: values(f"block {name}", shape, dtype) for name, shape in shapes.items()}
    made |= {name: oracle.rounded(made[name] / 8, dtype) for name in ("qkv", "out", "head")}
    table = oracle.rounded(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "float32")
    return made | {"table": table, "norm": values("block norm", (WIDTH,), dtype)}


@dataclass(frozen=True)
class Shape:
    """What differs between two blocks that are compared: `v` multiplies the values."""

    attention: Attention = PLAIN
    v: float = 1.0
    residual: bool = True


class Block:
    """Two layers of norm, rope and attention over sequences in a poisoned cache."""

    def __init__(self, rig: Rig, shape: Shape = Shape()) -> None:
        self.rig, self.shape, self.lengths = rig, shape, lengths_of(rig)
        w = weights(rig.dtype, sum(self.lengths))
        scaled = w["qkv"] * np.repeat((1, 1, shape.v), parts_of(HEADS))[:, None]
        layer = {
            "norm": rig.pack("norm", w["norm"]),
            "qkv": rig.pack("linear", scaled, segments=parts_of(HEADS)),
            "out": rig.pack("linear_reduce", w["out"]),
        }
        top: dict[str, Any] = {"x": rig.pack("embed", w["x"]), "head": rig.pack("logits", w["head"])}
        top["table"] = rig.pack("rope", w["table"])
        self.layers = 2 if shape.residual else 1
        self.run = rig.compile(self._step, Params(top, [layer] * self.layers))

    def cache(self, pages: int) -> Any:
        spec, kv = self.rig.kv(pages, HEADS, self.layers)
        return self.rig.backend.import_pages(kv, range(pages), poison(spec, pages))

    def serve(self, ragged: Ragged, plan: Plan, kv: Any = None) -> tuple[dict[int, Arr], Any]:
        """Logits [V] of the last token of every sequence that ends, and the cache."""
        kv = self.cache(ragged.num_pages) if kv is None else kv
        out: dict[int, Arr] = {}
        for parts in plan:
            logits, kv = self.run(kv, ragged.batch(parts))
            rows = self.rig.fetch(logits, (len(parts), VOCAB))
            out |= {p.seq: row for p, row in zip(parts, rows, strict=True) if p.stop == self.lengths[p.seq]}
        return out, kv

    def logits(self, plan: Plan | None = None, seed: int = 0) -> Arr:
        """[S,V], all sequences served, on pages that `seed` shuffles; without a plan, in one batch."""
        ragged = Ragged(self.lengths, self.rig.page, seed)
        got, _ = self.serve(ragged, plan or ragged.whole())
        return np.stack([got[seq] for seq in range(len(self.lengths))])

    def floors(self) -> Arr:
        """[S] per sequence, how far honest arithmetic takes this block from PLAIN."""
        return floors_of(self.rig.dtype, self.lengths, self.shape)

    def agree(self, what: str, got: Arr, want: Arr, exact: bool | None = None) -> None:
        if self.rig.backend.caps.batch_invariant if exact is None else exact:
            same(f"{what}, bit for bit", got, want)
        else:
            self.rig.close(what, got, want, 2 * self.floors())  # both may be off

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        a, top = self.shape.attention, params.top
        spec = AttnSpec(HEADS, a.scale, a.window, a.softcap)

        def body(w: dict[str, Any], x: Any, kv: Any) -> Any:
            q, k, v = ops.qkv(ops.rms_norm(x, w["norm"], EPS), w["qkv"], HEADS)
            q, k = ops.rope(q, k, top["table"], m)
            out, kv = ops.attend(q, k, v, kv, m, spec)
            out = ops.linear_reduce(out, w["out"])
            return (ops.add(x, out) if self.shape.residual else out), kv

        x, kv = ops.layers([body] * len(params.layers), params.layers, ops.embed(top["x"], m), kv)
        return ops.logits(ops.last(x, m), top["head"]), kv


@cache
def floors_of(dtype: str, lengths: tuple[int, ...], shape: Shape) -> Arr:
    plain = replace(shape, attention=PLAIN)
    others = [computed(p, dtype, lengths, shape) for p in oracle.emulated(dtype)]
    return floor(computed(EXACT, dtype, lengths, plain), others, "float32")


def computed(p: Precision, dtype: str, lengths: tuple[int, ...], shape: Shape) -> Arr:
    """The block in the oracle's arithmetic, [S,V]."""
    w = weights(dtype, sum(lengths))
    out = []
    for x in np.split(w["x"], np.cumsum(lengths)[:-1]):
        for _ in range(2 if shape.residual else 1):
            rows = oracle.linear(p, oracle.rms_norm(p, x, w["norm"], EPS), w["qkv"]).reshape(len(x), -1, HEADS.dim)
            q, k, v = np.split(rows, [HEADS.q, HEADS.q + HEADS.kv], axis=1)
            q, k = (oracle.rope(p, part, w["table"], np.arange(len(x))) for part in (q, k))
            got = oracle.attend(p, q, k, v * shape.v, shape.attention).reshape(len(x), -1)
            got = oracle.linear(p, got, w["out"])
            x = oracle.add(p, x, got) if shape.residual else got
        out.append(oracle.linear(p, x[-1:], w["head"], final=True)[0])
    return np.stack(out)


def permute(rig: Rig) -> None:
    """The order of the sequences in the batch."""
    block = Block(rig)
    want = block.logits()

    def relation(order: list[int]) -> None:
        block.agree("in another order", block.logits([[Part(s, 0, block.lengths[s]) for s in order]]), want)

    search(relation, 20, order=st.permutations(range(len(block.lengths))))


def rename(rig: Rig) -> None:
    """The pages of the sequences."""
    block = Block(rig)
    want = block.logits()
    search(lambda seed: block.agree("on other pages", block.logits(seed=seed), want), 15, seed=SEEDS)


def split(rig: Rig) -> None:
    """Where sequences are cut, and what runs beside them."""
    block = Block(rig)
    want = block.logits()
    search(lambda plan: block.agree("cut", block.logits(plan), want), 40, plan=plans(block.lengths))


def interleave(rig: Rig) -> None:
    """Two groups of sequences served in turn from one cache, each as if it were alone."""
    block = Block(rig)
    ragged = Ragged(block.lengths, rig.page)

    def relation(plan: Plan, group: list[bool]) -> None:
        parted = [[[p for p in parts if group[p.seq] is side] for parts in plan] for side in (False, True)]
        alone: dict[int, Arr] = {}
        for own in parted:
            alone |= block.serve(ragged, [parts for parts in own if parts])[0]
        turns = [parts for pair in zip(*parted, strict=True) for parts in pair if parts]
        got, _ = block.serve(ragged, turns)
        block.agree("in turn", np.stack([got[s] for s in sorted(got)]), np.stack([alone[s] for s in sorted(alone)]))

    groups = st.lists(st.booleans(), min_size=len(block.lengths), max_size=len(block.lengths))
    search(relation, 20, plan=plans(block.lengths), group=groups)


def offload(rig: Rig) -> None:
    """All pages of a cache exported midway and imported into another, elsewhere."""
    block = Block(rig)
    here = Ragged(block.lengths, rig.page)

    def relation(plan: Plan, at: int, seed: int) -> None:
        at = min(at, len(plan))
        there = Ragged(block.lengths, rig.page, seed)
        done, kv = block.serve(here, plan[:at])
        data = rig.export(kv, np.concatenate(here.pages).tolist())
        moved = rig.backend.import_pages(block.cache(there.num_pages), np.concatenate(there.pages).tolist(), data)
        got = done | block.serve(there, plan[at:], moved)[0]
        want = done | block.serve(here, plan[at:], kv)[0]
        block.agree(
            "from imported pages", np.stack([got[s] for s in sorted(got)]), np.stack([want[s] for s in sorted(want)])
        )

    search(relation, 20, plan=plans(block.lengths), at=st.integers(1, 4), seed=SEEDS)


def scaled_values(rig: Rig) -> None:
    """Values times a power of two give outputs times it, exactly."""
    block = Block(rig, Shape(residual=False))

    def relation(power: int, plan: Plan) -> None:
        scaled = Block(rig, Shape(v=2.0**power, residual=False))
        block.agree("scaled back", scaled.logits(plan) / 2.0**power, block.logits(plan))

    search(relation, 10, power=st.sampled_from((-3, 1, 4)), plan=plans(block.lengths))


def wide_window(rig: Rig) -> None:
    """A window that nothing falls out of."""
    block = Block(rig)

    def relation(beyond: int, plan: Plan) -> None:
        windowed = Block(rig, Shape(replace(PLAIN, window=max(block.lengths) + beyond)))
        block.agree("without a window", windowed.logits(plan), block.logits(plan), exact=False)

    search(relation, 10, beyond=st.integers(0, 600), plan=plans(block.lengths))


def high_softcap(rig: Rig) -> None:
    """A softcap far above every score."""
    block = Block(rig)

    def relation(cap: float, plan: Plan) -> None:
        capped = Block(rig, Shape(replace(PLAIN, softcap=cap)))
        capped.agree("without a softcap", capped.logits(plan), block.logits(plan), exact=False)

    search(relation, 10, cap=st.sampled_from((50.0, 200.0)), plan=plans(block.lengths))


PARAMETERS = st.builds(
    SampleRow,
    temperature=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    top_k=st.sampled_from((0, 1, 5, 50)),
    top_p=st.sampled_from((1.0, 0.9, 0.4)),
    min_p=st.sampled_from((0.0, 0.1)),
    seed=st.integers(-(2**31), 2**31 - 1),
    position=st.integers(0, 2**31 - 1),
)
PICKED = st.lists(PARAMETERS, min_size=1, max_size=24)


def agree_on_tokens(sampler: Sampler, ids: list[int], picked: list[SampleRow], got: list[int], want: list[int]) -> None:
    """Equal, but where rounding may decide between two tokens."""
    for i, row, a, b in zip(ids, picked, got, want, strict=True):
        if a != b and not {a, b} <= oracle.sample(sampler.x[i], row):
            raise Mismatch(f"sampled {a} from logits row {i} with {row}; expected {b}, as before")


def shift(rig: Rig) -> None:
    """A constant added to all logits. They are multiples of 1/8 below 4, so that no dtype rounds the sum."""
    grid = np.clip(np.round(values("grid", (64, VOCAB), "float32") * 8) / 8, -3.875, 3.875)
    samplers = {c: Sampler(rig, grid + c) for c in (0.0, -4.0, 0.5, 4.0)}

    def relation(picked: list[SampleRow], by: float) -> None:
        ids = list(range(len(picked)))
        agree_on_tokens(samplers[0.0], ids, picked, *(samplers[c].tokens(ids, picked) for c in (by, 0.0)))

    search(relation, 20, picked=PICKED, by=st.sampled_from((-4.0, 0.5, 4.0)))


def masked(rig: Rig) -> None:
    """Tokens masked out that were not sampled anyway."""
    sampler = Sampler(rig)

    def relation(picked: list[SampleRow], keep: int) -> None:
        ids = [63 - n for n in range(len(picked))]
        plain = [replace(row, top_k=0, top_p=1.0, min_p=0.0) for row in picked]
        want = sampler.tokens(ids, plain)
        kept = [i for i in range(VOCAB) if keep >> i & 1]
        some = [replace(row, allowed=tuple(sorted({*kept, t}))) for row, t in zip(plain, want, strict=True)]
        agree_on_tokens(sampler, ids, some, sampler.tokens(ids, some), want)

    search(relation, 20, picked=PICKED, keep=st.integers(0, 2**VOCAB - 1))


def sampled_in_any_order(rig: Rig) -> None:
    """The rows of a batch permuted."""
    sampler = Sampler(rig)

    def relation(picked: list[SampleRow], order: list[int]) -> None:
        order = [n for n in order if n < len(picked)]
        want = sampler.tokens(list(range(len(picked))), picked)
        got = sampler.tokens(order, [picked[n] for n in order])
        same("the tokens", got, [want[n] for n in order])

    search(relation, 20, picked=PICKED, order=st.permutations(range(24)))


class Model:
    """A cache of PAGES pages beside an array that holds what it must hold. Page 0 is not looked at."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.table = rig, values("written", (64, 4 * HEADS.dim), rig.dtype)
        top = {"x": rig.pack("embed", self.table), "heads": rig.pack_heads(HEADS)}
        self.run = rig.compile(self._step, Params(top | {"end": rig.pack("logits", np.eye(8, 128))}, [{}, {}]))
        self.clear()

    def clear(self) -> None:
        self.spec, kv = self.rig.kv(PAGES, HEADS, 2)
        self.want = poison(self.spec, PAGES)
        self.kv = self.rig.backend.import_pages(kv, range(PAGES), self.want.copy())  # it may be read later
        self.asked: list[tuple[str, Any, Arr]] = []

    def write(self, pages: list[int], start: int, count: int) -> None:
        """`count` tokens from position `start` of a sequence on `pages`, as far as they fit."""
        size = self.rig.page
        at = np.arange(start, min(start + count, len(pages) * size), dtype=np.int32)
        if not len(at):
            return
        slots, n = np.array(pages, np.int32)[at // size] * size + at % size, len(at)
        used = np.array([pages[: -(-(int(at[-1]) + 1) // size)]], np.int32)
        ends, back = np.array([n - 1], np.int32), np.full(n, -1, np.int32)
        cu, length = np.array([0, n], np.int32), at[-1:] + 1
        _, self.kv = self.run(self.kv, HostBatch(at % 64, at, slots, cu, length, used, ends, back))
        k, v = (self.table[at % 64, i * HEADS.dim : (i + 1) * HEADS.dim] for i in (2, 3))
        for i, x in enumerate((k, v)):
            self.want[i, :, slots // size, slots % size, 0] = x[:, None].astype(self.want.dtype)

    def copy(self, pages: list[int]) -> None:
        """The first half to the second."""
        half = len(pages) // 2
        src, dst = pages[:half], pages[half : 2 * half]
        self.kv = self.rig.backend.copy_pages(self.kv, src, dst)
        self.want[:, :, dst] = self.want[:, :, src]

    def put(self, pages: list[int], seed: int) -> None:
        r = np.random.default_rng(seed)
        data = r.integers(-99, 99, self.want[:, :, pages].shape).astype(self.want.dtype)
        self.kv = self.rig.backend.import_pages(self.kv, pages, data)
        self.want[:, :, pages] = data

    def ask(self, pages: list[int]) -> None:
        """An export that is looked at in the end."""
        asked = self.rig.backend.export_pages(self.kv, pages)
        self.asked.append((f"the export of {pages}", asked, self.want[:, :, pages]))

    def check(self) -> None:
        self.ask(list(range(1, PAGES)))
        for what, asked, want in self.asked:
            same(what, asked.result(timeout=60), want)

    def _step(self, ops: Any, p: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        x = ops.embed(p.top["x"], m)

        def body(layer: dict[str, Any], out: Any, kv: Any) -> Any:
            q, k, v = ops.qkv(x, p.top["heads"], HEADS)
            return ops.attend(q, k, v, kv, m, AttnSpec(HEADS, 0.125))

        out, kv = ops.layers([body] * len(p.layers), p.layers, x, kv)
        return ops.logits(ops.last(out, m), p.top["end"]), kv


SOME = st.lists(st.integers(1, PAGES - 1), min_size=1, unique=True)


def copies(rig: Rig) -> None:
    """The export of a copy is that of its source."""
    model = Model(rig)

    def relation(pages: list[int]) -> None:
        model.clear()
        model.copy(pages)
        half = len(pages) // 2
        source, copy = (rig.export(model.kv, p) for p in (pages[:half], pages[half : 2 * half]))
        same("the copy", copy, source)
        model.check()

    search(relation, 25, pages=SOME)


def round_trip(rig: Rig) -> None:
    """What is imported comes out, in any order."""
    model = Model(rig)

    def relation(pages: list[int], seed: int) -> None:
        model.clear()
        model.put(pages, seed)
        model.ask(sorted(pages, key=lambda p: (p * seed) % 11))
        model.check()

    search(relation, 25, pages=SOME, seed=SEEDS)


ACTIONS = st.one_of(
    st.tuples(st.just("write"), SOME, st.integers(0, 40), st.integers(1, 40)),
    st.tuples(st.just("copy"), SOME),
    st.tuples(st.just("put"), SOME, SEEDS),
    st.tuples(st.just("ask"), SOME),
)


def any_order(rig: Rig) -> None:
    """Writes, copies, imports and exports in any order, against an array."""
    model = Model(rig)

    def relation(actions: list[tuple[Any, ...]]) -> None:
        model.clear()
        for name, *arguments in actions:
            getattr(model, name)(*arguments)
        model.check()

    search(relation, 60, actions=st.lists(ACTIONS, max_size=10))


for dtype in ("float32", "bfloat16"):
    for body in (permute, rename, split, interleave, offload, copies, round_trip, any_order):
        case(f"L2/meta/{body.__name__}", dtype, body)
    for body in (scaled_values, shift, sampled_in_any_order):
        case(f"L1/meta/{body.__name__}", dtype, body)
    case("L1/meta/wide_window", dtype, wide_window, features=("window",))
    case("L1/meta/high_softcap", dtype, high_softcap, features=("softcap",))
    case("L1/meta/masked", dtype, masked, features=("mask",))
