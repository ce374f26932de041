"""The verbs, each in a step that repeats it over layers. The time of one call is the difference to the same step
without the verb, so that embedding, reading back and launching cancel out.

Each layer has weights and a cache of its own, and there are as many as it takes to read more than a device's caches
hold, within reason. What a verb returns always reaches the result, and no two calls have the same inputs, so a compiler
can drop none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from polyradix.backend.protocol import AttnSpec, Heads, Params
from polyradix_conformance import oracle
from polyradix_conformance.oracle import HOST, Arr, Precision
from polyradix_conformance.perf import truth
from polyradix_conformance.perf.program import (
    TINY,
    Caches,
    Program,
    Shape,
    Subject,
    checker,
    normal,
    picked,
    rows_shape,
    weights,
)
from polyradix_conformance.rig import Rig

INPUT = 128  # columns of what q, k and v are made from
EPS = 1e-5

Body = Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, Any]]  # (ops, top, layer params, carry, layer kv, meta)


@dataclass(frozen=True)
class Scale:
    """Layers are added until they read `flush` bytes, but no more than `depth`: a long step takes long to compile."""

    flush: int
    depth: int

    def layers(self, layer_bytes: int) -> int:
        return min(self.depth, max(1, -(-self.flush // layer_bytes)))

    def streams(self, layer_bytes: int) -> bool:
        """Whether the layers overflow caches."""
        return self.layers(layer_bytes) * layer_bytes >= self.flush


def size_of(dtype: str) -> int:
    return int(np.dtype(HOST[dtype]).itemsize)


class Stack:
    """Steps of layers over one carry: `enter` makes it, `leave` takes the array to be read back out of it."""

    def __init__(
        self,
        rig: Rig,
        shape: Shape,
        width: int,
        top: dict[str, Any],
        enter: Callable[[Any, Any, Any], Any],
        leave: Callable[[Any, Any], Any] = lambda ops, carry: carry,
    ) -> None:
        self.rig, self.shape, self._enter, self._leave = rig, shape, enter, leave
        head = np.zeros((len(picked(width)), width))
        head[np.arange(len(head)), picked(width)] = 1
        self.top = {**top, "out": rig.pack("logits", head)}

    def program(self, body: Body, each: list[Any], heads: Heads = TINY, caches: Caches | None = None) -> Program:
        def step(ops: Any, p: Params, kv: Any, m: Any) -> tuple[Any, Any]:
            def layer(w: Any, carry: Any, kv: Any) -> tuple[Any, Any]:
                return body(ops, p.top, w, carry, kv, m)

            carry, kv = ops.layers([layer] * len(p.layers), p.layers, self._enter(ops, p.top, m), kv)
            return ops.logits(ops.last(self._leave(ops, carry), m), p.top["out"]), kv

        return Program(self.rig, step, Params(self.top, each), self.shape, heads, caches)


def nothing(ops: Any, top: Any, w: Any, carry: Any, kv: Any, m: Any) -> tuple[Any, Any]:
    """A layer without the verb."""
    return carry, kv


def linear(rig: Rig, scale: Scale, rows: int, k: int, n: int) -> Subject:
    """linear [k] to [n] and linear_reduce back, layer after layer: two calls each."""
    shape, dtype = rows_shape(rows), rig.dtype
    x, up, down = normal("x", (rows, k), dtype), weights("up", n, k, dtype), weights("down", k, n, dtype)
    count = scale.layers(2 * k * n * size_of(dtype))
    turned = [(np.roll(up, i, axis=0), np.roll(down, i, axis=0)) for i in range(count)]
    each = [{"up": rig.pack("linear", a), "down": rig.pack("linear_reduce", b)} for a, b in turned]
    stack = Stack(rig, shape, k, {"x": rig.pack("embed", x)}, lambda ops, top, m: ops.embed(top["x"], m))

    def body(ops: Any, top: Any, w: Any, x: Any, kv: Any, m: Any) -> tuple[Any, Any]:
        return ops.linear_reduce(ops.linear(x, w["up"]), w["down"]), kv

    def formula(p: Precision) -> Arr:
        y = x[shape.last_rows]
        for a, b in turned:
            y = truth.linear(p, truth.linear(p, y, a), b)
        return y

    few = stack.program(nothing, [{}] * count)
    return Subject(stack.program(body, each), checker(rig, shape, formula), 2 * count, few)


def norms(rig: Rig, scale: Scale, width: int) -> tuple[list[Arr], list[Any]]:
    """Weights near one of a norm in each layer, on the host and packed."""
    host = [normal(f"norm {i}", (width,), rig.dtype, 0.1, 1.0) for i in range(scale.depth)]
    return host, [{"w": rig.pack("norm", w)} for w in host]


def rms_norm(rig: Rig, scale: Scale, rows: int, width: int, fused: bool) -> Subject:
    """rms_norm, or `fused` add_rms_norm, of the one before."""
    shape, x = rows_shape(rows), normal("x", (rows, width), rig.dtype)
    host, each = norms(rig, scale, width)

    def enter(ops: Any, top: Any, m: Any) -> Any:
        x = ops.embed(top["x"], m)
        return x, x

    def body(ops: Any, top: Any, w: Any, carry: Any, kv: Any, m: Any) -> tuple[Any, Any]:
        x, h = carry
        return (ops.add_rms_norm(x, h, w["w"], EPS) if fused else (ops.rms_norm(x, w["w"], EPS), h)), kv

    def formula(p: Precision) -> Arr:
        y = h = x[shape.last_rows]
        for w in host:
            h = oracle.add(p, h, y) if fused else y
            y = oracle.rms_norm(p, h, w, EPS)
        return y

    stack = Stack(rig, shape, width, {"x": rig.pack("embed", x)}, enter, lambda ops, carry: carry[0])
    few = stack.program(nothing, each)
    return Subject(stack.program(body, each), checker(rig, shape, formula), len(each), few)


def gated(rig: Rig, scale: Scale, rows: int, width: int) -> Subject:
    """Layers of rms_norm, gated and add, less layers of rms_norm and add."""
    shape, host = rows_shape(rows), {"x": 2 * width, "sum": width, "other": width}
    arrays = {name: normal(name, (rows, columns), rig.dtype) for name, columns in host.items()}
    top = {name: rig.pack("embed", x) for name, x in arrays.items()}
    w, each = norms(rig, scale, 2 * width)

    def body(ops: Any, top: Any, w: Any, carry: Any, kv: Any, m: Any, gate: bool) -> tuple[Any, Any]:
        x, total, other = carry
        x = ops.rms_norm(x, w["w"], EPS)
        return (x, ops.add(total, ops.gated(x, "silu") if gate else other), other), kv

    def formula(p: Precision) -> Arr:
        y, total = arrays["x"][shape.last_rows], arrays["sum"][shape.last_rows]
        for v in w:
            y = oracle.rms_norm(p, y, v, EPS)
            total = oracle.add(p, total, oracle.gated(p, y))
        return oracle.add(p, total, oracle.gated(p, y))

    stack = Stack(
        rig,
        shape,
        width,
        top,
        lambda ops, top, m: tuple(ops.embed(top[name], m) for name in arrays),
        lambda ops, carry: ops.add(carry[1], ops.gated(carry[0], "silu")),
    )
    many, few = (stack.program(partial(body, gate=gate), each) for gate in (True, False))
    return Subject(many, checker(rig, shape, formula), len(each), few)


class Attention:
    """Layers that turn q and k a number of times and attend with them over the layer's own cache, or do not attend; an
    add collects the outputs."""

    def __init__(self, rig: Rig, shape: Shape, heads: Heads) -> None:
        self.rig, self.shape, self.heads, dtype = rig, shape, heads, rig.dtype
        width, values = heads.q * heads.dim, (heads.q + 2 * heads.kv) * heads.dim
        self.caches = Caches(heads, shape.context, dtype)
        self.x, self.sum = normal("x", (shape.rows, INPUT), dtype), normal("sum", (shape.rows, width), dtype)
        self.w = weights("qkv", values, INPUT, dtype)
        self.table = rope_table(shape.context, heads.dim)
        segments = (width, heads.kv * heads.dim, heads.kv * heads.dim)
        top = {
            "x": rig.pack("embed", self.x),
            "sum": rig.pack("embed", self.sum),
            "qkv": rig.pack("linear", self.w, segments=segments),
            "table": rig.pack("rope", self.table),
        }
        self.stack = Stack(rig, shape, width, top, self._enter, lambda ops, carry: carry[0])

    def program(self, count: int, turns: int = 0, attends: bool = True) -> Program:
        def body(ops: Any, top: Any, w: Any, carry: Any, kv: Any, m: Any) -> tuple[Any, Any]:
            total, out, q, k, v = carry
            for _ in range(turns):
                q, k = ops.rope(q, k, top["table"], m)
            if attends:
                out, kv = ops.attend(q, k, v, kv, m, AttnSpec(self.heads, self.heads.dim**-0.5))
            return (ops.add(total, out), *carry[1:]), kv

        held = (self.heads, self.caches) if attends else (TINY, None)
        return self.stack.program(body, [{}] * count, *held)

    def formula(self, p: Precision, count: int, turns: int = 0) -> Arr:
        return np.stack([self._row(p, seq, count, turns) for seq in self.shape.checked])

    def _enter(self, ops: Any, top: Any, m: Any) -> Any:
        total = ops.embed(top["sum"], m)
        return total, total, *ops.qkv(ops.embed(top["x"], m), top["qkv"], self.heads)

    def _row(self, p: Precision, seq: int, count: int, turns: int) -> Arr:
        """The result of the last row of a sequence."""
        new, heads = self.shape.new, self.heads
        rows, first = slice(seq * new, (seq + 1) * new), self.shape.context - new
        x = truth.linear(p, self.x[rows], self.w).reshape(new, -1, heads.dim)
        q, k, v = x[:, : heads.q], x[:, heads.q : -heads.kv], x[:, -heads.kv :]
        for _ in range(turns):
            q, k = (oracle.rope(p, y, self.table, np.arange(first, first + new)) for y in (q, k))
        outs = []
        for layer in range(min(count, self.caches.contents)):
            before = self.caches.of(layer, seq)[:, :first]
            keys, values = (np.concatenate([a, b]) for a, b in zip(before, (k, v), strict=True))
            outs.append(truth.attend(p, q[-1], keys, values, heads.dim**-0.5).ravel())
        total: Arr = self.sum[rows][-1]
        for layer in range(count):
            total = oracle.add(p, total, outs[layer % len(outs)])
        return total


def rope_table(positions: int, dim: int) -> Arr:
    angles = np.arange(positions)[:, None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def attend(rig: Rig, scale: Scale, shape: Shape, heads: Heads) -> Subject:
    count = scale.layers(2 * shape.seqs * shape.context * heads.kv * heads.dim * size_of(rig.dtype))
    work = Attention(rig, shape, heads)
    check = checker(rig, shape, lambda p: work.formula(p, count))
    return Subject(work.program(count), check, count, work.program(count, attends=False))


def rope(rig: Rig, scale: Scale, shape: Shape, heads: Heads) -> Subject:
    """q and k turned again and again, before one attention."""
    work = Attention(rig, shape, heads)
    check = checker(rig, shape, lambda p: work.formula(p, 1, scale.depth))
    return Subject(work.program(1, scale.depth), check, scale.depth, work.program(1))
