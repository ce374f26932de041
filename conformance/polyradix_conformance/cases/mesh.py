"""The mesh: collectives, verbs over shards, the cache and a whole model, on 1, 2 and 4 tensor-parallel ranks.

What a rank alone holds is made by a linear over the identity, split by rows. It is seen through the cache, where every
rank writes keys of its own and an export shows them in rank order, or through all_gather and logits. Everything is
compared with the oracle, so that two numbers of ranks that pass agree with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Heads, HostArray, KVSpec, ParamPart, ParamSpec
from polyradix.graph.dense import make_step
from polyradix_conformance import oracle, tiny
from polyradix_conformance import oracle_collectives as talk
from polyradix_conformance.cases import case, state
from polyradix_conformance.cases.sampling import greedy_batch
from polyradix_conformance.cases.verbs import compare, linear_answer, linear_inputs
from polyradix_conformance.flow import Flow, poison
from polyradix_conformance.inputs import REGIMES, Part, Ragged, ragged_lengths, values
from polyradix_conformance.oracle import EXACT, Arr, Attention, Precision
from polyradix_conformance.rig import Mismatch, Rig, parts_of, same
from polyradix_conformance.tolerance import floor

SIZES = (1, 2, 4)
VERBS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute", "barrier")
SUMS = ("all_reduce", "reduce_scatter")
ROWS = 5
DIM = 64  # columns, or head size, of one rank's array
GQA = Heads(q=8, kv=4, dim=64)
SHAPE = (192, 160)  # in, out
PERMUTATIONS: dict[int, list[list[int]]] = {1: [[0]], 2: [[1, 0], [0, 1]], 4: [[1, 2, 3, 0], [2, 0, 3, 1]]}


def arguments(name: str, n: int, axis: int) -> list[tuple[Any, ...]]:
    """What to call a verb with, besides the array: every root, and permutations that are not their own inverse."""
    if name in ("all_gather", "reduce_scatter", "all_to_all"):
        return [(axis,)]
    each: dict[str, list[Any]] = {"broadcast": list(range(n)), "permute": PERMUTATIONS[n]}
    return [(argument,) for argument in each[name]] if name in each else [()]


def called(collectives: Any, name: str, x: Any, args: tuple[Any, ...]) -> Any:
    if name != "barrier":
        return getattr(collectives, name)(x, *args)
    collectives.barrier()
    return x


def answer(name: str, p: Precision, xs: list[Arr], args: tuple[Any, ...]) -> list[Arr]:
    out: list[Arr] = getattr(talk, name)(*([p] if name in SUMS else []), xs, *args)
    return out


def collective(rig: Rig, name: str) -> None:
    """On [T,columns] along the columns, and on [T,heads,dim] along the heads."""
    for regime in REGIMES if name in SUMS else REGIMES[:1]:
        x = values(name, (ROWS, rig.ranks * DIM), rig.dtype, regime)
        for args in arguments(name, rig.ranks, 1):
            in_columns(rig, name, x, args)
    for axis in (1, 2) if name == "all_to_all" else (1,):  # the others change the size of heads along axis 2
        for args in arguments(name, rig.ranks, axis):
            in_heads(rig, name, args)


def in_columns(rig: Rig, name: str, x: Arr, args: tuple[Any, ...]) -> None:
    n, collectives = rig.ranks, rig.backend.collectives
    xs = [talk.part(x, rank, n, 1) for rank in range(n)]
    width = answer(name, EXACT, xs, args)[0].shape[1]
    split = {"split": rig.pack("linear", np.eye(x.shape[1]), segments=(x.shape[1],))}

    def run(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        return collectives.all_gather(called(collectives, name, ops.linear(x, top["split"]), args), 1)

    judge(rig, name, args, xs, rig.verb(run, x, split, n * width))


def in_heads(rig: Rig, name: str, args: tuple[Any, ...]) -> None:
    n, collectives = rig.ranks, rig.backend.collectives
    heads = Heads(n * n, n * n, DIM)
    x = values(f"{name} of heads", (ROWS, heads.kv, DIM), rig.dtype)
    xs = [talk.part(x, rank, n, 1) for rank in range(n)]
    held = n * answer(name, EXACT, xs, args)[0].shape[1]
    pick = rig.pack("linear", np.tile(np.eye(heads.kv * DIM), (3, 1)), segments=parts_of(heads))

    def run(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        y = called(collectives, name, ops.qkv(x, top["pick"], heads)[1], args)
        return y, y, y

    got, _ = rig.heads(run, x.reshape(ROWS, -1), {"pick": pick}, Heads(held, held, DIM))
    judge(rig, name, args, xs, got)


def judge(rig: Rig, name: str, args: tuple[Any, ...], xs: list[Arr], got: Arr) -> None:
    """`got` holds what every rank has, joined along axis 1."""
    truth = answer(name, EXACT, xs, args)
    others = [answer(name, p, xs, args) for p in oracle.emulated(rig.dtype)]
    for rank, want in enumerate(truth):
        mine = talk.part(got, rank, len(xs), 1)
        what = f"{name}({', '.join(map(str, args))}) of {want.ndim} axes, rank {rank}"
        if name in SUMS and len(xs) > 1:
            rig.close(what, mine, want, floor(want, [o[rank] for o in others], rig.dtype))
        else:
            same(what, mine, want)
        if name == "all_reduce":
            same(f"{what}, against rank 0", mine, talk.part(got, 0, len(xs), 1))


def embed(rig: Rig) -> None:
    """Every rank has every column."""
    x, collectives = values("embed", (ROWS, 80), rig.dtype, "outlier"), rig.backend.collectives
    got = rig.verb(lambda ops, x, top, m: collectives.all_gather(x, 1), x, {}, rig.ranks * 80)
    same("embed", got, np.tile(x, (1, rig.ranks)))


def linear(rig: Rig, bias: bool) -> None:
    """Two segments: each rank has its part of both."""
    collectives, parts = rig.backend.collectives, (96, 64)
    ids = np.split(np.arange(sum(parts)), parts[:1])
    order = np.concatenate([talk.part(i, rank, rig.ranks, 0) for rank in range(rig.ranks) for i in ids])
    for regime in REGIMES:
        x, w, b = linear_inputs(rig.dtype, regime, ROWS, SHAPE)
        top = {"w": rig.pack("linear", w, b if bias else None, parts)}
        got = rig.verb(lambda ops, x, top, m: collectives.all_gather(ops.linear(x, top["w"]), 1), x, top, sum(parts))
        truth, floors = linear_answer(rig.dtype, regime, ROWS, SHAPE, bias)
        rig.close(f"linear, {regime}", got, truth[:, order], floors)


def linear_reduce(rig: Rig, bias: bool) -> None:
    for regime in REGIMES:
        x, w, b = linear_inputs(rig.dtype, regime, ROWS, SHAPE)
        split = rig.pack("linear", np.eye(SHAPE[0]), segments=SHAPE[:1])
        top = {"split": split, "w": rig.pack("linear_reduce", w, b if bias else None)}
        got = rig.verb(lambda ops, x, top, m: ops.linear_reduce(ops.linear(x, top["split"]), top["w"]), x, top, len(w))
        rig.close(f"linear_reduce, {regime}", got, *linear_answer(rig.dtype, regime, ROWS, SHAPE, bias))


def logits(rig: Rig) -> None:
    """203 rows: no number of ranks divides them."""
    for regime in REGIMES:
        x, w, _ = linear_inputs(rig.dtype, regime, ROWS, (192, 203))
        got = rig.logits(lambda ops, x, top, m: ops.logits(ops.last(x, m), top["w"]), x, {"w": rig.pack("logits", w)})
        rig.close(f"logits, {regime}", got, *linear_answer(rig.dtype, regime, ROWS, (192, 203), final=True))


def feed_forward(rig: Rig) -> None:
    x, w, _ = linear_inputs(rig.dtype, "normal", ROWS, (80, 192))
    _, down, _ = linear_inputs(rig.dtype, "normal", ROWS, (96, 80))
    top = {"up": rig.pack("linear", w, segments=(96, 96)), "down": rig.pack("linear_reduce", down)}
    got = rig.verb(
        lambda ops, x, top, m: ops.linear_reduce(ops.linear_gated(x, top["up"], "silu"), top["down"]), x, top, 80
    )
    compare(rig, "feed-forward", got, lambda p: oracle.linear(p, oracle.gated(p, oracle.linear(p, x, w)), down))


def qkv(rig: Rig, bias: bool) -> None:
    """k and v of grouped heads; then q, in place of both."""
    parts = parts_of(GQA)
    x, w, b = linear_inputs(rig.dtype, "normal", ROWS, (80, sum(parts)))
    top = {"w": rig.pack("linear", w, b if bias else None, parts)}
    truth, floors = linear_answer(rig.dtype, "normal", ROWS, (80, sum(parts)), bias)
    want = dict(zip("qkv", np.split(truth.reshape(ROWS, -1, 64), [GQA.q, GQA.q + GQA.kv], axis=1), strict=True))

    def pick(ops: Any, x: Any, top: dict[str, Any], m: Any, which: str) -> Any:
        q, k, v = ops.qkv(x, top["w"], GQA)
        return (q, q, q) if which == "qq" else (q, k, v)

    for which, heads in (("kv", GQA), ("qq", Heads(GQA.q, GQA.q, GQA.dim))):
        got = rig.heads(partial(pick, which=which), x, top, heads)
        for name, mine in zip(which, got, strict=True):
            rig.close(name, mine, want[name], np.repeat(floors[:, None], heads.kv, axis=1))


def flow_of(rig: Rig, seed: int = 0) -> Flow:
    return Flow(rig, Ragged(ragged_lengths(rig.page), rig.page, seed), GQA, Attention(0.125))


def attend(rig: Rig, plan: Literal["decode", "mixed"]) -> None:
    flow = flow_of(rig)
    flow.check(f"attend {plan}", getattr(flow.ragged, plan)())


def exported(rig: Rig) -> None:
    """The canonical form does not know how many ranks there are."""
    flow = flow_of(rig)
    for parts in flow.ragged.chunked():
        flow.step(parts)
    pages = list(range(1, flow.ragged.num_pages))
    same("the export", flow.export(pages)[:, :1], flow.contents(flow.ragged.whole()[0])[:, :, 1:])


def imported(rig: Rig) -> None:
    """Decoding from pages in the canonical form, whoever wrote them."""
    flow = flow_of(rig, seed=1)
    head, tail = flow.ragged.decode()
    data = poison(flow.spec, flow.ragged.num_pages)
    data[:, :1] = flow.contents(head)
    flow.kv = rig.backend.import_pages(flow.kv, range(flow.ragged.num_pages), data)
    flow.check("decoding from imported pages", [tail])


def declined(rig: Rig) -> None:
    """What cannot be split evenly is refused before it is read."""

    def never(part: ParamPart = "weight") -> HostArray:
        raise Mismatch("a parameter that cannot be split was read; expected an error before")

    dtype, n = rig.dtype, rig.ranks
    attempts: dict[str, Callable[[], Any]] = {
        "segments": lambda: rig.backend.pack(ParamSpec("w", "linear", (64 * n + 1, 64), dtype, (64 * n, 1), 0), never),
        "columns": lambda: rig.backend.pack(ParamSpec("w", "linear_reduce", (64, 64 * n + 1), dtype, (), 1), never),
        "kv_heads": lambda: rig.backend.alloc_kv(KVSpec(1, n + 1, 64, rig.page, dtype), 2),
        "fewer kv_heads than ranks": lambda: rig.backend.alloc_kv(KVSpec(1, 1, 64, rig.page, dtype), 2),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except (Unsupported, ValueError):
            continue
        raise Mismatch(f"{what} that {n} ranks do not divide: accepted; expected Unsupported or ValueError")


def model(rig: Rig, name: str) -> None:
    """Greedy decoding with the core's own graph: logits and tokens of every step; the next reads them on the device."""
    truth, spec = tiny.decoding(name, rig.dtype), tiny.MODELS[name]
    seqs, lengths = range(len(truth.prompts)), np.array([len(p) for p in truth.prompts])
    ragged = Ragged(tuple(lengths + tiny.STEPS), rig.page)
    _, kv = rig.kv(ragged.num_pages, spec.heads, spec.layers)
    run = rig.compile(make_step(spec), tiny.packed(name, rig.dtype, rig.backend))
    batch = ragged.batch([Part(s, 0, lengths[s]) for s in seqs])
    batch.tokens[:] = np.concatenate(truth.prompts)
    prev = None
    for step, tokens in enumerate(truth.tokens):
        if step > 0:
            batch = ragged.batch([Part(s, n - 1, n) for s, n in zip(seqs, lengths + step, strict=True)])
            batch.from_prev[:] = seqs
            batch.tokens[:] = 0
        out, kv = run(kv, batch, prev)
        prev = rig.backend.sample(out, greedy_batch(len(seqs)))
        got = rig.fetch(out, truth.logits[step].shape)
        rig.close(f"logits of step {step}", got, truth.logits[step], truth.floors[step])
        same(f"tokens of step {step}", rig.fetch(prev, tokens.shape), tokens)


STATE = (state.written, state.last_layer, state.copied, state.moved, state.batching)  # with two KV heads

for dtype, tp in product(("float32", "bfloat16"), SIZES):
    ranked = partial(case, dtype=dtype, tp=tp, profile="mesh")
    for name in VERBS:
        ranked(f"L1/{name}/tp-{tp}", body=partial(collective, name=name))
    for name in tiny.MODELS:
        features = ("bias", "qk_norm") if name == "biased" else ()
        ranked(f"L5/{name}/tp-{tp}", body=partial(model, name=name), features=features)
    if tp == 1:
        continue  # the rest is what the other profiles test
    ranked(f"L0/declined/tp-{tp}", body=declined)
    for body in (embed, logits, feed_forward):
        ranked(f"L1/{body.__name__}/tp-{tp}", body=body)
    for with_bias in (linear, linear_reduce, qkv):
        ranked(f"L1/{with_bias.__name__}/tp-{tp}", body=partial(with_bias, bias=False))
        ranked(f"L1/{with_bias.__name__}/bias/tp-{tp}", body=partial(with_bias, bias=True), features=("bias",))
    for plan in ("decode", "mixed"):
        ranked(f"L1/attend/{plan}/tp-{tp}", body=partial(attend, plan=plan))
    for body in (exported, imported, *(STATE if tp == 2 else ())):
        ranked(f"L2/{body.__name__}/tp-{tp}", body=body)
