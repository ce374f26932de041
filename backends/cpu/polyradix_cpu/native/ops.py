"""The verbs over the kernel library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import SampleBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expanded, Expansions, expansion_forced
from polyradix.backend.protocol import (
    AttnSpec,
    Compiled,
    Gate,
    Heads,
    LatentSpec,
    LatentWeights,
    Limits,
    MoeSpec,
    MoeWeights,
    Params,
    Step,
)
from polyradix_cpu.native import lib
from polyradix_cpu.native.kv import LayerKV
from polyradix_cpu.native.lib import F32, FUSED_GELU, FUSED_SILU, PLAIN, SEQS, SPLIT_GATE, Kind, Library, Op, Samples
from polyradix_cpu.native.params import NativeWeight, Tensor
from polyradix_cpu.native.program import Capacity, Eager, NativeMeta, Program, Recorder

FUSED: dict[str, int] = {"silu": FUSED_SILU, "gelu_tanh": FUSED_GELU}
_FLOATS, _INTS = ("temperature", "top_p", "min_p"), ("top_k", "seed", "position")


def _stride(x: Tensor) -> int:
    """The row stride of x, whose rows must each be contiguous."""
    row = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if size != 1 and stride != row:
            raise ValueError(f"x has shape {tuple(x.shape)} and strides {x.stride()}; expected contiguous rows")
        row *= size
    return int(x.stride(0)) if x.shape[0] > 1 else row


def _flag(dtype: Any) -> int:
    if dtype == torch.float32:
        return F32
    if dtype == torch.bfloat16:
        return 0
    raise Unsupported("dtype", f"{dtype}; expected float32 or bfloat16")


class NativeOps(Expansions):
    """protocol.Ops over torch CPU tensors (bfloat16 or float32), NativeWeight, LayerKV and NativeMeta.

    `threads` is the number of threads of every call. Not safe for use from two threads at once."""

    def __init__(self, library: Library, threads: int | None = None) -> None:
        self.library = library
        self.threads = threads or torch.get_num_threads()
        self._eager = Eager(library)
        self._sink: Eager | Recorder = self._eager

    def _emit(
        self,
        kind: Kind,
        x: Tensor,
        out: tuple[int, ...],
        args: Sequence[Any],
        n: Sequence[int],
        f: Sequence[float] = (),
        m: Any = None,
        mult: int = 1,
        dtype: Any = None,
        extra: Sequence[tuple[int, ...]] = (),
        seqs: bool | None = None,
    ) -> list[Tensor]:
        """Makes the outputs (`out`, then `extra`) and the op, whose pointers are `args` and then the outputs."""
        seqs = self._sink.is_seqs(x) if seqs is None else seqs
        made = [self._sink.empty(s, dtype or x.dtype, seqs) for s in (out, *extra)]
        op = Op(kind=kind, flags=_flag(x.dtype) | (SEQS if seqs else 0), mult=mult)
        for i, a in enumerate([*args, *made]):
            op.p[i] = None if a is None else a.data_ptr()
        op.n[: len(n)] = list(n)
        op.f[: len(f)] = list(f)
        self._sink.emit(op, out[0], m, self.threads)
        return made

    def embed(self, w: NativeWeight, m: NativeMeta) -> Tensor:
        hidden = w.shape[1]
        return self._emit(Kind.EMBED, w.data, (m.T, hidden), [w.data], [hidden], m=m, seqs=False)[0]

    def _linear(self, x: Tensor, w: NativeWeight, mode: int, dtype: Any = None) -> Tensor:
        n, k = w.shape
        if x.shape[1] != k or x.dtype != w.data.dtype:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected [T,{k}] {w.data.dtype}")
        width = n // 2 if mode in FUSED.values() else n
        wide = (dtype or x.dtype) == torch.float32
        sizes = [w.depth, n, _stride(x), width, mode, int(wide), k]
        return self._emit(Kind.LINEAR, x, (x.shape[0], width), [x, w.data, w.bias], sizes, dtype=dtype)[0]

    def linear(self, x: Tensor, w: NativeWeight) -> Tensor:
        return self._linear(x, w, SPLIT_GATE if w.gated else PLAIN)

    linear_reduce = linear

    def linear_gated(self, x: Tensor, w: NativeWeight, kind: Gate) -> Tensor:
        if not w.gated:
            return super().linear_gated(x, w, kind)
        self._check_gate(kind)
        return self._linear(x, w, FUSED[kind])

    def logits(self, x: Tensor, w: NativeWeight, softcap: float | None = None) -> Tensor:
        out = self._linear(x, w, PLAIN, torch.float32)
        return (
            out if softcap is None else self._emit(Kind.CAP, out, tuple(out.shape), [out], out.shape[1:], [softcap])[0]
        )

    def qkv(self, x: Tensor, w: NativeWeight, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x, w)
        q, k, v = y.split([heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim], 1)
        return q.unflatten(1, (-1, heads.dim)), k.unflatten(1, (-1, heads.dim)), v.unflatten(1, (-1, heads.dim))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(f"y is {tuple(y.shape)} {y.dtype}; expected {tuple(x.shape)} {x.dtype}")
        sizes = [prod(x.shape[1:]), _stride(x), _stride(y)]
        return self._emit(Kind.ADD, x, tuple(x.shape), [x, y], sizes)[0]

    def rms_norm(self, x: Tensor, w: NativeWeight, eps: float) -> Tensor:
        inner = x.shape[1] if x.dim() == 3 else 1
        sizes = [x.shape[-1], _stride(x), inner]
        return self._emit(Kind.NORM, x, tuple(x.shape), [x, w.data], sizes, [eps], mult=inner)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, w: NativeWeight, eps: float) -> tuple[Tensor, Tensor]:
        shape = tuple(x.shape)
        if residual.shape != x.shape or _stride(x) != shape[1] or _stride(residual) != shape[1]:
            total = self.add(residual, x)
            return self.rms_norm(total, w, eps), total
        args = [x, residual, w.data]
        normed, total = self._emit(Kind.ADD_NORM, x, shape, args, [shape[1]], [eps], extra=[shape])
        return normed, total

    def rope(self, q: Tensor, k: Tensor, table: NativeWeight, m: NativeMeta) -> tuple[Tensor, Tensor]:
        sizes = [q.shape[1], k.shape[1], q.shape[2], _stride(q), _stride(k)]
        shapes = tuple(q.shape), tuple(k.shape)
        made = self._emit(Kind.ROPE, q, shapes[0], [q, k, table.data], sizes, m=m, extra=shapes[1:], seqs=False)
        return made[0], made[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, m: NativeMeta, a: AttnSpec
    ) -> tuple[Tensor, LayerKV]:
        heads, dim = a.heads, kv.dim
        if heads.q % heads.kv or heads.dim != dim or kv.data.dtype != q.dtype:
            raise Unsupported("attend", f"{heads} over a cache of head size {dim} in {kv.data.dtype}")
        sizes = [heads.q, heads.kv, dim, _stride(q), _stride(k), _stride(v), kv.page_size, a.window or 0, kv.group]
        args = [q, k, v, kv.data, None if a.sinks is None else a.sinks.data]
        shape = (q.shape[0], heads.q * dim)
        return self._emit(Kind.ATTEND, q, shape, args, sizes, [a.scale, a.softcap or 0.0], m=m, seqs=False)[0], kv

    def attend_latent(
        self, q: Tensor, c: Tensor, kv: LayerKV, m: NativeMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Tensor, LayerKV]:
        k, v = w.up.split(a.nope)
        tokens, heads, width = len(q), k.shape[0], a.rank + a.rope
        if kv.dim != width or q.shape[1] != heads * (a.nope + a.rope):
            raise ValueError(f"q is {tuple(q.shape)} and a cached row {kv.dim}; expected {heads} heads of {a}")
        query = self._heads(q, k, width)
        sizes = [heads, a.nope, a.rope, a.rank, _stride(q), _stride(c), a.floor_scale]
        args = [q, c, w.norm.data, w.table.data, query]
        (row,) = self._emit(Kind.LATENT, q, (tokens, width), args, sizes, [a.eps, a.attn_scale], m=m, seqs=False)
        row, alone = row.unflatten(1, (1, width)), AttnSpec(Heads(heads, 1, width), a.scale)
        return self._heads(self.attend(query, row, row, kv, m, alone)[0], v, a.v), kv

    def _heads(self, x: Tensor, w: NativeWeight, width: int) -> Tensor:
        """Each head's columns of x [T,H*n], the first of them, times its weight of w [H,N,K], as the first N of its
        `width` columns of the result."""
        heads, n, k = w.shape
        sizes = [w.depth, n, x.shape[1], heads * width, PLAIN, int(x.dtype == torch.float32), k, heads]
        return self._emit(Kind.HEADS, x, (len(x), heads * width), [x.contiguous(), w.data, None], sizes, seqs=False)[0]

    def gated(self, x: Tensor, kind: Gate) -> Tensor:
        self._check_gate(kind)
        half = x.shape[1] // 2
        sizes = [half, _stride(x), lib.GELU if kind == "gelu_tanh" else lib.SILU]
        return self._emit(Kind.GATED, x, (x.shape[0], half), [x], sizes)[0]

    def moe(self, x: Tensor, w: MoeWeights, s: MoeSpec) -> Tensor:
        tokens, hidden = x.shape
        flags = lib.SOFTMAX * (s.scoring == "softmax") | lib.RENORMALISE * s.renormalise
        flags |= lib.BIASED_LOGITS * (s.bias == "logits")
        sizes = [hidden, _stride(x), s.experts, s.top_k, s.groups, s.top_groups, s.group_best, flags]
        chosen, room = (tokens, s.top_k), (s.experts + 1 + 3 * tokens * s.top_k,)  # int32 in a float32 buffer
        args = [x, w.router.data, w.router.bias]
        weights, plan = self._emit(Kind.ROUTE, x, chosen, args, sizes, [s.scale], dtype=torch.float32, extra=[room])
        both = self._experts(x, w.gate_up, plan, s.top_k, s.top_k)
        inner = w.down.shape[2]
        gate, how = (lib.SILU, [0.0, 0.0]) if s.limit is None else (lib.CLAMPED, [s.alpha, s.limit])
        sizes = [inner, 2 * inner, gate]
        (part,) = self._emit(Kind.GATED, both, (*chosen, inner), [both], sizes, how, mult=s.top_k)
        parts = self._experts(part, w.down, plan, s.top_k)
        args = [parts, weights, plan]
        return self._emit(Kind.SUM, parts, (tokens, hidden), args, [hidden, s.top_k, s.experts])[0]

    def _experts(self, x: Tensor, w: NativeWeight, plan: Tensor, top_k: int, each: int = 0) -> Tensor:
        """Rows of all pairs, sorted by expert, as [T,top_k,N]; `each` pairs share a row of x, which is sorted if 0."""
        experts, n, k = w.shape
        if x.shape[-1] != k or x.dtype != w.data.dtype:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected rows of {k} {w.data.dtype}")
        stride = _stride(x) if each else k
        sizes = [w.depth, n, stride, n, PLAIN, int(x.dtype == torch.float32), k, experts]
        args, shape = [x, w.data, w.bias, plan], (x.shape[0], top_k, n)
        return self._emit(Kind.EXPERTS, x, shape, args, sizes, [each], mult=top_k)[0]

    def last(self, x: Tensor, m: NativeMeta) -> Tensor:
        return self._emit(Kind.LAST, x, (m.S, x.shape[1]), [x], [x.shape[1], _stride(x)], m=m, seqs=True)[0]

    def argmax(self, x: Tensor) -> Tensor:
        """The lowest index of each row's largest value: float32 [rows,V] -> int32 [rows]. Not a verb of a step."""
        rows, width = x.shape
        return self._emit(Kind.ARGMAX, x, (rows,), [x.contiguous()], [width], dtype=torch.int32, seqs=False)[0]

    def sample(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        """Backend.sample: float32 logits [S,V] -> int32 [S]. Raises ValueError when a row's mask allows no token."""
        logits = logits.contiguous()
        seqs, vocab = logits.shape
        out = torch.empty(seqs, dtype=torch.int32)
        kept: dict[str, Any] = {n: np.ascontiguousarray(getattr(batch, n), np.float32) for n in _FLOATS}
        kept |= {n: np.ascontiguousarray(getattr(batch, n), np.int32) for n in _INTS}
        if batch.mask is not None:
            kept["mask"] = np.ascontiguousarray(batch.mask, np.int32)
        samples = Samples(S=seqs, V=vocab, logits=logits.data_ptr(), out=out.data_ptr())
        for name, x in kept.items():
            setattr(samples, name, x.ctypes.data)
        self.library.sample(ctypes.byref(samples), self.threads)
        if batch.mask is not None and (out < 0).any():
            raise ValueError("a row of mask allows no token; expected at least one")
        return out

    def _check_gate(self, kind: str) -> None:
        if kind not in FUSED:
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(FUSED)}")

    def record(self, step: Step, params: Params, kv: list[LayerKV], limits: Limits) -> Program:
        """Runs `step` once over buffers of the largest batch, computing nothing, and keeps its ops."""
        recorder = Recorder()
        self._sink = recorder
        ops: Any = Expanded(self) if expansion_forced() else self
        try:
            logits, _ = step(ops, params, kv, Capacity(limits))
        finally:
            self._sink = self._eager
        return Program(self.library, recorder, logits)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        """A step that is recorded at its first call (and again for other parameters or another cache)."""
        held: dict[str, Any] = {}

        def run(params: Params, kv: list[LayerKV], m: NativeMeta) -> tuple[Tensor, list[LayerKV]]:
            if limits.max_tokens < m.T or limits.max_seqs < m.S:
                raise ValueError(f"batch of {m.T} tokens in {m.S} sequences; expected at most {limits}")
            if held.get("params") is not params or held["cache"] is not kv[0]:
                held.update(params=params, cache=kv[0], program=self.record(step, params, kv, limits))
            return held["program"].run(m, self.threads), kv

        return run
