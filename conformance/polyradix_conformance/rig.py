"""Drives one backend through the contract alone: no case knows how a backend holds an array.

Values go in as an embedding table whose rows the tokens name, and split into heads through an identity matrix, which is
exact in every dtype. They come back as the first result of a compiled step, one row per token or per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Backend, Heads, KVSpec, Limits, ParamKind, Params, ParamSpec
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.oracle import HOST, Arr
from polyradix_conformance.tolerance import K, worst_ratio

LIMITS = Limits(max_tokens=1024, max_seqs=64, max_context=1024)


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

    def pack(self, kind: ParamKind, value: Arr, bias: Arr | None = None, segments: tuple[int, ...] = ()) -> Any:
        dtype: Any = "float32" if kind == "rope" else self.dtype
        self._packed += 1
        spec = ParamSpec(f"{kind}_{self._packed}", kind, value.shape, dtype, segments, None, bias is not None)
        host = {"weight": value, "bias": bias}
        return self.backend.pack(spec, lambda part="weight": np.asarray(host[part]).astype(HOST[dtype]))

    def pack_heads(self, heads: Heads) -> Any:
        """The identity that splits rows of values into q, k and v."""
        parts = (heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim)
        return self.pack("linear", np.eye(sum(parts)), segments=parts)

    def kv(self, pages: int, heads: Heads, layers: int = 1, page: int | None = None) -> tuple[KVSpec, Any]:
        spec = KVSpec(layers, heads.kv, heads.dim, page or self.page, self.dtype)
        return spec, self.backend.alloc_kv(spec, pages)

    def compile(self, step: Callable[..., Any], params: Params) -> Callable[..., tuple[Any, Any]]:
        """run(kv, batch, prev=None) -> (device array, kv)."""
        compiled = self.backend.compile(step, LIMITS)

        def run(kv: Any, batch: HostBatch, prev: Any = None) -> tuple[Any, Any]:
            return compiled(params, kv, self.backend.prepare(batch, prev))

        return run

    def fetch(self, x: Any, shape: tuple[int, ...]) -> Arr:
        """As float64, with `shape`; trailing axes may be flattened by the backend."""
        got = self.backend.fetch(x).result(timeout=60)
        if got.size != np.prod(shape) or len(got) != shape[0]:
            raise Mismatch(f"fetched an array of shape {got.shape}; expected {shape}")
        return got.astype(np.float64).reshape(shape)

    def verb(self, fn: Callable[..., Any], x: Arr, top: dict[str, Any], shape: tuple[int, ...]) -> Arr:
        """fn(ops, x on the device, top, meta) -> array, for x [T,N] as one sequence of T tokens."""
        rows = Ragged((len(x),), self.page)
        _, kv = self.kv(rows.num_pages, Heads(1, 1, 64))
        params = Params({**top, "x": self.pack("embed", x)}, [])

        def step(ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
            return fn(ops, ops.embed(params.top["x"], m), params.top, m), kv

        out, _ = self.compile(step, params)(kv, rows.batch([Part(0, 0, len(x))]))
        return self.fetch(out, shape)

    def close(self, what: str, got: Arr, truth: Arr, floors: Arr) -> None:
        """Every row (all axes but the last) within K floors."""
        ratio, row = worst_ratio(got, truth, floors)
        self.worst = max(self.worst, ratio)
        if not ratio <= K:
            at = np.unravel_index(row, truth.shape[:-1])
            where = ", ".join(map(str, at))
            raise Mismatch(f"{what}: the error of row ({where}) is {ratio:.3g} times the rounding floor; at most {K:g}")


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
