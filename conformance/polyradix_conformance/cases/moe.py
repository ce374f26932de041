"""L1 and L5: the verb moe against the oracle. L4: models with experts, one batch against another.

Tokens whose experts are decided by rounding are left out, but for ties, whose values are small powers of two and so
equal in any order of summation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import numpy as np

from polyradix.backend.protocol import MoeSpec, MoeWeights
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.cases.graph import Model, profile_of
from polyradix_conformance.golden import families, load
from polyradix_conformance.inputs import REGIMES, values
from polyradix_conformance.oracle import EXACT, Arr
from polyradix_conformance.oracle_moe import Experts, Routing, margin, moe, scores
from polyradix_conformance.rig import Mismatch, Rig, same
from polyradix_conformance.tolerance import floor

H, F, E = 128, 128, 16  # widths that are whole tiles anywhere
MARGIN = 1e-3
SOFTMAX = Routing(E, 3)
GROUPED = Routing(E, 3, "sigmoid", True, 2.5, groups=4, top_groups=2, group_best=2)
LOGITS_BIASED = replace(SOFTMAX, bias="logits", renormalise=False)
ROUTINGS = {
    "softmax": SOFTMAX,
    "sigmoid": replace(SOFTMAX, scoring="sigmoid"),
    "unnormalised": replace(SOFTMAX, renormalise=False),
    "scale": replace(SOFTMAX, scale=0.375),
    "groups": GROUPED,
    "groups-by-best": Routing(E, 3, renormalise=False, scale=4.0, groups=4, top_groups=2, group_best=1),
    "one-of-a-group": replace(GROUPED, top_k=1, top_groups=1),
    "top-1": replace(SOFTMAX, top_k=1, renormalise=False),
    "all-experts": replace(SOFTMAX, top_k=E),
    "single-expert": Routing(1, 1),
    "many-experts": Routing(60, 4),
}
Answer = tuple[Arr, Arr, Arr]  # x [T,H], truth [T,H], floors [T]


@cache
def experts(dtype: str, count: int = E, bias: bool = False, width: int = F, all_biased: bool = False) -> Experts:
    """Scores of most tokens are well apart; biases are negative, so that no choice value is the larger for being 0."""
    router = values(f"moe router {count}", (count, H), dtype) / 8
    gate_up = values(f"moe gate_up {count} {width}", (count, 2 * width, H), dtype) / np.sqrt(H)
    down = values(f"moe down {count} {width}", (count, H, width), dtype) / np.sqrt(width)
    offset = values(f"moe bias {count}", (count,), "float32") / 4 - 2 if bias else None
    more = [values(f"moe bias {count} {n}", (count, n), dtype) if all_biased else None for n in (2 * width, H)]
    return Experts(
        oracle.rounded(router, dtype), offset, oracle.rounded(gate_up, dtype), oracle.rounded(down, dtype), *more
    )


def clear_rows(x: Arr, w: Experts, r: Routing) -> Arr:
    """Those of x whose experts no rounding decides."""
    apart = [margin(row, w.choice_bias(r), r) > MARGIN for row in scores(EXACT, x, w, r)]
    out: Arr = x[np.array(apart)]
    return out


def answer(x: Arr, w: Experts, r: Routing, dtype: str) -> Answer:
    truth, *others = (moe(p, x, w, r) for p in (EXACT, *oracle.emulated(dtype)))
    return x, truth, floor(truth, others, dtype)


@cache
def normal(dtype: str, r: Routing, rows: int, bias: bool, regime: str = "normal") -> tuple[Experts, Answer]:
    w = experts(dtype, r.experts, bias)
    x = clear_rows(values("moe x", (3 * rows + 8, H), dtype, regime), w, r)[:rows]
    if len(x) < rows:
        raise ValueError(f"only {len(x)} of {rows} tokens have a clear choice")
    return w, answer(x, w, r, dtype)


def packed(rig: Rig, w: Experts) -> dict[str, Any]:
    gate_up = rig.pack("experts", w.gate_up, w.gate_up_bias)
    down = rig.pack("experts", w.down, w.down_bias)
    return {"router": rig.pack("router", w.router, w.bias), "gate_up": gate_up, "down": down}


def run(rig: Rig, x: Arr, w: Experts, r: Routing, width: int = H) -> Arr:
    spec = MoeSpec(**asdict(r))

    def verb(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        return ops.moe(x, MoeWeights(top["router"], top["gate_up"], top["down"]), spec)

    return rig.verb(verb, x, packed(rig, w), width)


def routed(rig: Rig, r: Routing, bias: bool, rows: int = 37, regime: str = "normal") -> None:
    w, (x, truth, floors) = normal(rig.dtype, r, rows, bias, regime)
    rig.close(f"moe, {rows} tokens", run(rig, x, w, r), truth, floors)


def counts(rig: Rig) -> None:
    """From one token to more than a tile of them."""
    for rows in (1, 2, 5, 64):
        routed(rig, SOFTMAX, False, rows)


def empty(rig: Rig) -> None:
    """All tokens to the same experts, the first ones or the last ones."""
    for first in (0, E - SOFTMAX.top_k):
        router = np.zeros((E, H))
        router[first : first + SOFTMAX.top_k, 0] = 2, 1.75, 1.5
        w = replace(experts(rig.dtype), router=router)
        x = values("moe empty", (37, H), rig.dtype)
        x[:, 0] = 4
        rig.close(f"moe, experts from {first} on", *checked(rig, x, w, SOFTMAX))


def narrow(rig: Rig) -> None:
    """Experts narrower than H, and of another width than the router's."""
    w = experts(rig.dtype, E, False, 3 * 64)
    x = clear_rows(values("moe x", (24, H), rig.dtype), w, SOFTMAX)
    rig.close("moe, 192 wide", *checked(rig, x, w, SOFTMAX))


def checked(rig: Rig, x: Arr, w: Experts, r: Routing) -> Answer:
    _, truth, floors = answer(x, w, r, rig.dtype)
    return run(rig, x, w, r), truth, floors


def clamped(rig: Rig) -> None:
    """As gpt-oss has it: every bias, and a limit that half of all rows meet."""
    w = experts(rig.dtype, E, True, F, True)
    r = replace(SOFTMAX, bias="logits", limit=1.25, alpha=1.702)
    x = clear_rows(values("moe x", (40, H), rig.dtype), w, r)
    rig.close("moe, clamped", *checked(rig, x, w, r))


def biased_logits(rig: Rig) -> None:
    """A bias so large that it changes the weights."""
    w = replace(experts(rig.dtype, E, True), bias=values("moe logits bias", (E,), "float32") * 2)
    x = clear_rows(values("moe x", (40, H), rig.dtype), w, LOGITS_BIASED)
    rig.close("moe, biased logits", *checked(rig, x, w, LOGITS_BIASED))


def ties(rig: Rig, r: Routing) -> None:
    """Experts share their router rows, over groups too, and every sum is exact."""
    random = np.random.default_rng(3)
    rows = random.integers(-2, 3, (3, H)) / 8
    w = replace(experts(rig.dtype), router=rows[random.integers(0, 3, E)])
    x = random.integers(-2, 3, (37, H)) / 4
    rig.close("moe, equal scores", *checked(rig, x, w, r))


def alone(rig: Rig) -> None:
    """A token's result is the same whoever is in the batch: bit for bit if the backend says so."""
    w, (x, truth, floors) = normal(rig.dtype, GROUPED, 37, True)
    whole = run(rig, x, w, GROUPED)
    for part in (slice(0, 1), slice(36, 37), slice(3, 20)):
        got = run(rig, x[part], w, GROUPED)
        rig.close("moe, part of the batch", got, truth[part], floors[part])
        if rig.backend.caps.batch_invariant:
            same("moe, part of the batch against the whole", got, whole[part])


def batches(rig: Rig, family: str) -> None:
    """Chunks, decode steps and mixed batches give the bits of whole sequences, where the backend promises that. Where
    it does not, rounding may choose other experts, and only numbers are asked for."""
    model = Model(rig, load(family))
    ragged, seen = model.ragged, dict[tuple[int, int], Arr]()
    for what in ("whole", "chunked", "decode", "mixed"):
        model.kv = model.cache()
        for parts in getattr(ragged, what)():
            for part, row in zip(parts, model.step(parts)[0], strict=True):
                if not np.isfinite(row).all():
                    raise Mismatch(f"{what}: logits of sequence {part.seq} are not all finite")
                want = seen.setdefault((part.seq, part.stop), row)
                if rig.backend.caps.batch_invariant:
                    same(f"{what}: sequence {part.seq} after {part.stop} tokens", row, want)


def add(name: str, dtype: str, body: Callable[[Rig], None], tp: int = 1, more: tuple[str, ...] = ()) -> None:
    layer = "L1" if tp == 1 else "L5"
    case(f"{layer}/moe/{name}", dtype, body, features=("moe", *more), tp=tp, profile="moe")


for dtype in ("float32", "bfloat16"):
    for name, r in ROUTINGS.items():
        add(name, dtype, partial(routed, r=r, bias=False))
        if r.experts == E:
            add(f"{name}/bias", dtype, partial(routed, r=r, bias=True))
    for regime in REGIMES[1:]:
        add(f"regime/{regime}", dtype, partial(routed, r=SOFTMAX, bias=False, rows=16, regime=regime))
    add("counts", dtype, counts)
    add("empty", dtype, empty)
    add("width", dtype, narrow)
    add("biased-logits", dtype, biased_logits, more=("moe_bias",))
    for tp in (1, 2):
        add("clamped" if tp == 1 else f"clamped/tp-{tp}", dtype, clamped, tp, more=("moe_bias", "moe_clamp"))
    add("ties", dtype, partial(ties, r=SOFTMAX))
    add("ties/groups", dtype, partial(ties, r=GROUPED))
    add("alone", dtype, alone)
    for family in families():
        if profile_of(load(family)) == "moe":
            needs = load(family).spec.needs(dtype)
            body, features = partial(batches, family=family), tuple(sorted(needs.features))
            case(f"L4/moe/batches/{family}", dtype, body, features=features, profile="moe")
    for tp in (2, 4):
        add(f"tp-{tp}", dtype, partial(routed, r=GROUPED, bias=True), tp)
