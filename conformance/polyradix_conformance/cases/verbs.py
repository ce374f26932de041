"""L1: every verb but attention and sampling, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from polyradix.backend.protocol import Gate, Heads, Params
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.inputs import REGIMES, Ragged, values
from polyradix_conformance.oracle import EXACT, Arr, Precision
from polyradix_conformance.rig import Rig, parts_of, same
from polyradix_conformance.tolerance import floor

ROWS = (1, 5, 37)
SHAPES = ((192, 160), (80, 50))  # in, out
MHA = Heads(q=4, kv=4, dim=64)
EPS = 1e-5

Formula = Callable[[Precision], Arr]


@cache
def linear_inputs(dtype: str, regime: str, rows: int, shape: tuple[int, int]) -> tuple[Arr, Arr, Arr]:
    """x [T,I], w [O,I] and a bias [O]."""
    n, m = shape
    x = values(f"linear x {rows}", (rows, n), dtype, regime)
    w = oracle.rounded(values(f"linear w {shape}", (m, n), dtype) / np.sqrt(n), dtype)
    return x, w, values("linear bias", (m,), dtype)


def compare(rig: Rig, what: str, got: Arr, formula: Formula) -> None:
    truth, *others = map(formula, (EXACT, *oracle.emulated(rig.dtype)))
    rig.close(what, got, truth, floor(truth, others, rig.dtype))


def embed(rig: Rig) -> None:
    x = values("embed", (37, 80), rig.dtype, "outlier")
    same("embed", rig.verb(lambda ops, x, top, m: x, x, {}, 80), x)


@cache
def linear_answer(
    dtype: str, regime: str, rows: int, shape: tuple[int, int], bias: bool = False, final: bool = False
) -> tuple[Arr, Arr]:
    """Truth and floor per row; `final` for logits, which are float32."""
    x, w, b = linear_inputs(dtype, regime, rows, shape)
    truth, *others = (oracle.linear(p, x, w, b if bias else None, final) for p in (EXACT, *oracle.emulated(dtype)))
    return truth, floor(truth, others, "float32" if final else dtype)


def linear(rig: Rig, verb: Literal["linear", "linear_reduce"], regime: str, bias: bool) -> None:
    for rows in ROWS:
        for shape in SHAPES:
            x, w, b = linear_inputs(rig.dtype, regime, rows, shape)
            top = {"w": rig.pack(verb, w, b if bias else None)}
            got = rig.verb(lambda ops, x, top, m: getattr(ops, verb)(x, top["w"]), x, top, len(w))
            rig.close(f"{verb}, {rows} rows of {shape}", got, *linear_answer(rig.dtype, regime, rows, shape, bias))


def logits(rig: Rig, regime: str) -> None:
    for rows in ROWS:
        shape = (192, 203)
        x, w, _ = linear_inputs(rig.dtype, regime, rows, shape)
        top = {"w": rig.pack("logits", w)}
        got = rig.logits(lambda ops, x, top, m: ops.logits(ops.last(x, m), top["w"]), x, top)
        rig.close(f"logits, {rows} rows", got, *linear_answer(rig.dtype, regime, rows, shape, final=True))


def capped_logits(rig: Rig) -> None:
    x, w, _ = linear_inputs(rig.dtype, "normal", 5, (192, 203))
    top = {"w": rig.pack("logits", w)}
    got = rig.logits(lambda ops, x, top, m: ops.logits(ops.last(x, m), top["w"], 1.5), x, top)
    precisions = EXACT, *oracle.emulated(rig.dtype)
    truth, *others = (oracle.capped(p, oracle.linear(p, x, w, final=True), 1.5) for p in precisions)
    rig.close("capped logits", got, truth, floor(truth, others, "float32"))


def last(rig: Rig) -> None:
    """The last row of each of several sequences."""
    ragged = Ragged((3, 1, 8), rig.page)
    x = values("last", (ragged.rows, 80), rig.dtype)
    params = Params({"x": rig.pack("embed", x), "end": rig.pack("logits", np.eye(80))}, [])
    _, kv = rig.kv(ragged.num_pages, Heads(1, 1, 64))

    def step(ops: Any, p: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        return ops.logits(ops.last(ops.embed(p.top["x"], m), m), p.top["end"]), kv

    out, _ = rig.compile(step, params)(kv, ragged.batch(ragged.whole()[0]))
    same("last", rig.fetch(out, (3, 80)), x[[2, 3, 11]])


def qkv(rig: Rig, bias: bool) -> None:
    """As many kv heads as q heads: q is read back in place of k."""
    parts, rows = parts_of(MHA), 37
    x, w, b = linear_inputs(rig.dtype, "normal", rows, (80, sum(parts)))
    top = {"w": rig.pack("linear", w, b if bias else None, parts)}
    truth, floors = linear_answer(rig.dtype, "normal", rows, (80, sum(parts)), bias)
    want = np.split(truth.reshape(rows, -1, 64), 3, axis=1)

    def pick(ops: Any, x: Any, top: dict[str, Any], m: Any, which: tuple[int, int]) -> Any:
        out = ops.qkv(x, top["w"], MHA)
        return out[0], out[which[0]], out[which[1]]

    for which in ((0, 1), (1, 2)):
        got = rig.heads(partial(pick, which=which), x, top, MHA)
        for i, part in zip(which, got, strict=True):
            rig.close("qkv"[i], part, want[i], np.repeat(floors[:, None], MHA.q, axis=1))


def add(rig: Rig, regime: str) -> None:
    """x + linear(x, identity): both operands come from one table, shifted by a row of the identity."""
    x = values("add", (37, 80), rig.dtype, regime)
    top = {"w": rig.pack("linear", np.roll(np.eye(80), 1, axis=1))}
    got = rig.verb(lambda ops, x, top, m: ops.add(x, ops.linear(x, top["w"])), x, top, x.shape[1])
    compare(rig, "add", got, lambda p: oracle.add(p, x, np.roll(x, -1, axis=1)))


def rms_norm(rig: Rig, regime: str) -> None:
    for rows in ROWS:
        x, w = values("norm", (rows, 192), rig.dtype, regime), values("norm w", (192,), rig.dtype)
        top = {"w": rig.pack("norm", w)}
        got = rig.verb(lambda ops, x, top, m: ops.rms_norm(x, top["w"], EPS), x, top, x.shape[1])
        compare(rig, f"rms_norm of {rows} rows", got, partial(norm_formula, x, w))


def wide_norm(rig: Rig) -> None:
    """A float32 weight that bfloat16 cannot hold, as of a model whose norms add to it."""
    x, w = values("norm", (5, 192), rig.dtype), values("norm w", (192,), "float32")
    top = {"w": rig.pack("norm", w, dtype="float32")}
    got = rig.verb(lambda ops, x, top, m: ops.rms_norm(x, top["w"], EPS), x, top, x.shape[1])
    compare(rig, "rms_norm with a float32 weight", got, partial(norm_formula, x, w))


def norm_formula(x: Arr, w: Arr, p: Precision) -> Arr:
    return oracle.rms_norm(p, x, w, EPS)


def qk_norm(rig: Rig) -> None:
    """The norm over each head of q and of k, with weights of their own."""
    x = values("qk_norm", (5, 12 * 64), rig.dtype)
    w = values("qk_norm w", (2, 64), rig.dtype)
    top = {"q": rig.pack("norm", w[0]), "k": rig.pack("norm", w[1]), "heads": rig.pack_heads(MHA)}

    def normed(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        q, k, _ = ops.qkv(x, top["heads"], MHA)
        q, k = ops.rms_norm(q, top["q"], EPS), ops.rms_norm(k, top["k"], EPS)
        return q, q, k

    for i, got in enumerate(rig.heads(normed, x, top, MHA)):
        part = x.reshape(5, 12, 64)[:, 4 * i : 4 * i + 4]
        compare(rig, f"rms_norm of {'qk'[i]}", got, partial(norm_formula, part, w[i]))


def rope(rig: Rig, regime: str) -> None:
    rows = 37
    angles = np.arange(64)[:, None] * 0.7 ** np.arange(32)
    table = oracle.rounded(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "float32")
    x = values("rope", (rows, 12 * 64), rig.dtype, regime)
    top = {"table": rig.pack("rope", table), "heads": rig.pack_heads(MHA)}

    def turned(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        q, k, _ = ops.qkv(x, top["heads"], MHA)
        q, k = ops.rope(q, k, top["table"], m)
        return q, q, k

    for i, got in enumerate(rig.heads(turned, x, top, MHA)):
        part = x.reshape(rows, 12, 64)[:, 4 * i : 4 * i + 4]
        compare(rig, f"rope of {'qk'[i]}", got, partial(rope_formula, part, table))


def rope_formula(x: Arr, table: Arr, p: Precision) -> Arr:
    return oracle.rope(p, x, table, np.arange(len(x)))


def gated(rig: Rig, regime: str, kind: Gate = "silu") -> None:
    for rows in ROWS:
        x = values("gated", (rows, 2 * 96), rig.dtype, regime)
        got = rig.verb(lambda ops, x, top, m: ops.gated(x, kind), x, {}, 96)
        compare(rig, f"gated, {rows} rows", got, partial(gated_formula, x, kind))


def gated_formula(x: Arr, kind: Gate, p: Precision) -> Arr:
    return oracle.gated(p, x, kind)


def add_rms_norm(rig: Rig, regime: str) -> None:
    """Both results, the residual being the input turned by a linear."""
    x, w = values("add norm", (37, 80), rig.dtype, regime), values("add norm w", (80,), rig.dtype)
    residual = np.roll(x, -1, axis=1)
    top = {"w": rig.pack("norm", w), "turn": rig.pack("linear", np.roll(np.eye(80), 1, axis=1))}

    def total(p: Precision) -> Arr:
        return oracle.add(p, x, residual)

    def picked(ops: Any, x: Any, top: dict[str, Any], m: Any, which: int) -> Any:
        return ops.add_rms_norm(x, ops.linear(x, top["turn"]), top["w"], EPS)[which]

    formulas: tuple[Formula, Formula] = (lambda p: oracle.rms_norm(p, total(p), w, EPS), total)
    for i, what in enumerate(("the norm", "the sum")):
        got = rig.verb(partial(picked, which=i), x, top, 80)
        compare(rig, f"add_rms_norm, {what}", got, formulas[i])


def linear_gated(rig: Rig, regime: str, kind: Gate = "silu") -> None:
    for rows in ROWS:
        x, w, _ = linear_inputs(rig.dtype, regime, rows, (80, 2 * 96))
        top = {"w": rig.pack("linear", w, segments=(96, 96))}
        got = rig.verb(lambda ops, x, top, m: ops.linear_gated(x, top["w"], kind), x, top, 96)
        compare(rig, f"linear_gated, {rows} rows", got, partial(linear_gated_formula, x, w, kind))


def linear_gated_formula(x: Arr, w: Arr, kind: Gate, p: Precision) -> Arr:
    return oracle.gated(p, oracle.linear(p, x, w), kind)


LINEARS: tuple[Literal["linear", "linear_reduce"], ...] = ("linear", "linear_reduce")
BY_REGIME: dict[str, Callable[..., None]] = {
    "logits": logits,
    "add": add,
    "rms_norm": rms_norm,
    "rope": rope,
    "gated": gated,
    "add_rms_norm": add_rms_norm,
    "linear_gated": linear_gated,
}

for dtype in ("float32", "bfloat16"):
    case("L1/embed", dtype, embed)
    case("L1/last", dtype, last)
    case("L1/qkv", dtype, partial(qkv, bias=False))
    case("L1/qkv/bias", dtype, partial(qkv, bias=True), features=("bias",))
    case("L1/qk_norm", dtype, qk_norm, features=("qk_norm",))
    case("L1/rms_norm/wide-weight", dtype, wide_norm)
    case("L1/logits/softcap", dtype, capped_logits, features=("softcap",))
    for verb in LINEARS:
        bias = partial(linear, verb=verb, regime="normal", bias=True)
        case(f"L1/{verb}/bias", dtype, bias, features=("bias",))
    for regime in REGIMES:
        for verb in LINEARS:
            case(f"L1/{verb}/{regime}", dtype, partial(linear, verb=verb, regime=regime, bias=False))
        for name, body in BY_REGIME.items():
            case(f"L1/{name}/{regime}", dtype, partial(body, regime=regime))
        for name in ("gated", "linear_gated"):
            body = partial(BY_REGIME[name], regime=regime, kind="gelu_tanh")
            case(f"L1/{name}/gelu_tanh/{regime}", dtype, body, features=("gelu_tanh",))
