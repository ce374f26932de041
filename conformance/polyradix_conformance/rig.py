"""Drives one backend through the contract alone: no case knows how a backend holds an array.

Values go in as an embedding table whose rows the tokens name, and split into heads through an identity matrix, which is
exact in every dtype. They come back as logits over an identity matrix, one row per sequence, or through the cache: what
`attend` is given as k and v is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec, Backend, Heads, KVSpec, Limits, ParamKind, Params, ParamSpec
from polyradix.backend.shard import AXES
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.oracle import HOST, Arr
from polyradix_conformance.tolerance import K, worst_ratio

LIMITS = Limits(max_tokens=1024, max_seqs=64, max_context=1024)

Verb = Callable[[Any, Any, dict[str, Any], Any], Any]  # (ops, x on the device, parameters, meta)


class Mismatch(AssertionError):
    """The backend's answer is wrong."""


class Rig:
    """One backend at one dtype, for one case. `worst` is the largest error over floor seen so far."""

    def __init__(self, backend: Backend, dtype: str) -> None:
        self.backend = backend
        self.dtype: Any = dtype
        self.page = backend.caps.page_sizes[0]
        self.worst = 0.0
        self._packed = 0

    @property
    def ranks(self) -> int:
        return self.backend.collectives.size

    def pack(
        self, kind: ParamKind, value: Arr, bias: Arr | None = None, segments: tuple[int, ...] = (), dtype: Any = None
    ) -> Any:
        """Split over ranks as in a model: logits by rows, experts by id, latent_up by head, linear_reduce by columns,
        linear by rows of each segment; one without segments is whole on every rank."""
        axis = {**AXES, "linear": 0 if segments else None}.get(kind)
        dtype = dtype or ("float32" if kind in ("rope", "router", "sinks") else self.dtype)
        self._packed += 1
        spec = ParamSpec(f"{kind}_{self._packed}", kind, value.shape, dtype, segments, axis, bias is not None)
        host = {"weight": value, "bias": bias}
        return self.backend.pack(spec, lambda part="weight": np.asarray(host[part]).astype(HOST[dtype]))

    def pack_heads(self, heads: Heads) -> Any:
        """The identity that splits rows of values into q, k and v."""
        parts = parts_of(heads)
        return self.pack("linear", np.eye(sum(parts)), segments=parts)

    def kv(self, pages: int, heads: Heads, layers: int = 1, page: int | None = None) -> tuple[KVSpec, Any]:
        spec = KVSpec(layers, heads.kv, heads.dim, page or self.page, self.dtype)
        return spec, self.backend.alloc_kv(spec, pages)

    def compile(self, step: Callable[..., Any], params: Params) -> Callable[..., tuple[Any, Any]]:
        """run(kv, batch, prev=None) -> (logits on the device, kv)."""
        compiled = self.backend.compile(step, LIMITS)

        def run(kv: Any, batch: HostBatch, prev: Any = None) -> tuple[Any, Any]:
            return compiled(params, kv, self.backend.prepare(batch, prev))

        return run

    def fetch(self, x: Any, shape: tuple[int, ...]) -> Arr:
        """As float64, of exactly `shape`."""
        got = self.backend.fetch(x).result(timeout=60)
        if got.shape != shape:
            raise Mismatch(f"fetched an array of shape {got.shape}; expected {shape}")
        return got.astype(np.float64)

    def export(self, kv: Any, pages: Sequence[int]) -> Arr:
        return self.backend.export_pages(kv, pages).result(timeout=60)

    def verb(self, fn: Verb, x: Arr, top: dict[str, Any], width: int) -> Arr:
        """fn -> array [T,width], of x [T,N] as T sequences of one token."""
        out = {"out": self.pack("logits", np.eye(width))}
        return self.logits(lambda ops, x, top, m: ops.logits(ops.last(fn(ops, x, top, m), m), top["out"]), x, top | out)

    def logits(self, fn: Verb, x: Arr, top: dict[str, Any]) -> Arr:
        """fn -> logits [T,V], of x [T,N] as T sequences of one token."""
        rows = Ragged((1,) * len(x), self.page)
        _, kv = self.kv(rows.num_pages, Heads(self.ranks, self.ranks, 64))
        params = Params({**top, "x": self.pack("embed", x)}, [])
        run = self.compile(lambda ops, p, kv, m: (fn(ops, ops.embed(p.top["x"], m), p.top, m), kv), params)
        out, _ = run(kv, rows.batch([Part(s, 0, 1) for s in range(len(x))]))
        got = self.backend.fetch(out).result(timeout=60)
        if got.ndim != 2 or len(got) != len(x):
            raise Mismatch(f"fetched logits of shape {got.shape}; expected {len(x)} rows")
        return got.astype(np.float64)

    def heads(self, fn: Verb, x: Arr, top: dict[str, Any], heads: Heads) -> tuple[Arr, Arr]:
        """fn -> (q [T,Hq,D], and two arrays [T,Hk,D]), of x [T,N] as one sequence; the two, read from the cache."""
        rows = Ragged((len(x),), self.page)
        _, kv = self.kv(rows.num_pages, heads)
        end = {"o": self.pack("linear_reduce", np.eye(8, heads.q * heads.dim)), "end": self.pack("logits", np.eye(8))}
        params = Params({**top, **end, "x": self.pack("embed", x)}, [{}])

        def step(ops: Any, p: Params, kv: Any, m: Any) -> tuple[Any, Any]:
            x = ops.embed(p.top["x"], m)

            def body(layer: dict[str, Any], out: Any, kv: Any) -> Any:
                q, first, second = fn(ops, x, p.top, m)
                return ops.attend(q, first, second, kv, m, AttnSpec(heads, heads.dim**-0.5))

            out, kv = ops.layers([body] * len(p.layers), p.layers, x, kv)
            return ops.logits(ops.last(ops.linear_reduce(out, p.top["o"]), m), p.top["end"]), kv

        part = Part(0, 0, len(x))
        _, kv = self.compile(step, params)(kv, rows.batch([part]))
        first, second = rows.rows_in(self.export(kv, rows.pages[0].tolist()), part)[:, 0]
        return first, second

    def close(self, what: str, got: Arr, truth: Arr, floors: Arr) -> None:
        """Every row (all axes but the last) within K floors."""
        if got.shape != truth.shape:
            raise Mismatch(f"{what}: shape is {got.shape}; expected {truth.shape}")
        ratio, row = worst_ratio(got, truth, floors)
        self.worst = max(self.worst, ratio)
        if not ratio <= K:
            where = ", ".join(map(str, np.unravel_index(row, truth.shape[:-1])))
            raise Mismatch(f"{what}: the error of row ({where}) is {ratio:.3g} times the rounding floor; at most {K:g}")


def parts_of(heads: Heads) -> tuple[int, int, int]:
    """Columns of q, k and v."""
    return heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim


def same(what: str, got: Sequence[Any] | Arr, want: Sequence[Any] | Arr) -> None:
    """Equal bit for bit."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape is {got.shape}; expected {want.shape}")
    differ = np.flatnonzero((got != want).ravel())
    if len(differ):
        at = ", ".join(map(str, np.unravel_index(differ[0], got.shape)))
        values = got.ravel()[differ[0]], want.ravel()[differ[0]]
        raise Mismatch(
            f"{what}: {len(differ)} of {got.size} differ, first at ({at}): {values[0]}; expected {values[1]}"
        )
