"""The host side of the NumPy backend."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np

from polyradix.backend.alone import Alone
from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, KV_FP8, KV_GROUPS, QUANTS, Capabilities, Unsupported, check_claimed
from polyradix.backend.launch import Launcher
from polyradix.backend.layered import each_array, layered
from polyradix.backend.numpy.ops import Arr, NumpyMeta, NumpyOps, Packed
from polyradix.backend.protocol import (
    HOST_DTYPES,
    KV,
    KV_DTYPES,
    Array,
    Collectives,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    LogProbs,
    Memory,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
)
from polyradix.backend.quant import dequantise
from polyradix.backend.sampling import sample_host

MAX_TP = 8


class NumpyBackend:
    """Arrays are NumPy arrays, or futures of them with `async_launch`; a KV is a list of a layer's parts, changed in
    place."""

    ops: Ops
    collectives: Collectives

    def __init__(
        self, compute: Literal["float32", "float64"], async_launch: bool, collectives: Collectives | None = None
    ) -> None:
        if compute not in ("float32", "float64"):
            raise ValueError(f"compute is {compute!r}; expected 'float32' or 'float64'")
        self._wide = np.dtype(compute)
        self._store = HOST_DTYPES if compute == "float32" else dict.fromkeys(HOST_DTYPES, self._wide)
        self._launch = Launcher(async_launch)
        self.collectives = collectives or Alone()
        self.ops = NumpyOps(self._wide, self._store, self.collectives)
        self.caps = Capabilities(
            name="numpy",
            device=f"NumPy {np.__version__} on {platform.machine()}",
            dtypes=frozenset(HOST_DTYPES),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=1024,
            head_dim_multiple=2,
            features=FEATURES | QUANTS | {KV_FP8[0], KV_GROUPS},
            batch_invariant=True,
            async_launch=async_launch,
            max_tp=MAX_TP,
        )

    def memory(self) -> Memory:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
        return Memory(free=free, total=total)

    def pack(self, spec: ParamSpec, read: Reader) -> Packed:
        if spec.dtype not in HOST_DTYPES:
            raise Unsupported(spec.dtype, f"parameter {spec.name}; expected one of {sorted(HOST_DTYPES)}")
        bias = self._host(spec, read("bias"), spec.shape[:-1] or spec.shape) if spec.bias else None
        value = read() if spec.quant is None else dequantise(spec.quant, read)
        return Packed(spec, self._host(spec, value, spec.shape), bias)

    def kv_page_bytes(self, spec: KVSpec) -> int:
        per_token = spec.parts * spec.depth * spec.kv_heads * spec.head_dim
        return per_token * spec.page_size * self._kv_dtype(spec).itemsize

    def _kv_dtype(self, spec: KVSpec) -> np.dtype[Any]:
        out: np.dtype[Any] = self._store.get(spec.dtype, KV_DTYPES[spec.dtype])
        return out

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        check_claimed(spec, self.caps)
        shape, dtype = (pages, spec.page_size, spec.kv_heads, spec.head_dim), self._kv_dtype(spec)
        return layered(spec, lambda: (np.zeros(shape, dtype) for _ in range(spec.parts)))

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        batch.check_prev(prev)
        return NumpyMeta(batch, prev)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        def run(params: Params, kv: KV, meta: NumpyMeta) -> tuple[Array, KV]:
            limits.check(meta.batch.sizes)
            logits, new = self._launch.split(lambda held: step(self.ops, params, held, meta), 2, kv)
            return logits, new

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return self._launch.run(lambda x: sample_host(x.astype(np.float32), batch), logits)

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        return LogProbs(*self._launch.split(_logprobs, 3, logits, tokens, top))

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return self._launch.run(self._copy, kv, list(src), list(dst))

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return self._launch.future(self._export, kv, list(pages))

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        return self._launch.run(self._import, kv, list(pages), data)

    def fetch(self, x: Array) -> Future[HostArray]:
        return self._launch.future(np.copy, x)

    def _host(self, spec: ParamSpec, value: HostArray, shape: tuple[int, ...]) -> Arr:
        if value.shape != shape:
            raise ValueError(f"parameter {spec.name} has shape {value.shape}; expected {shape}")
        return np.ascontiguousarray(value.astype(HOST_DTYPES[spec.dtype]), self._wide)

    def _copy(self, kv: Any, src: list[int], dst: list[int]) -> Any:
        for parts in each_array(kv):
            for x in parts:
                x[dst] = x[src]
        return kv

    def _export(self, kv: Any, pages: list[int]) -> Arr:
        return np.stack([np.stack([parts[i][pages] for parts in each_array(kv)]) for i in range(len(kv[0]))])

    def _import(self, kv: Any, pages: list[int], data: Arr) -> Any:
        expected = self._shape(kv, len(pages))
        if data.shape != expected:
            raise ValueError(f"imported pages have shape {data.shape}; expected {expected}")
        return self._write(kv, pages, data)

    def _shape(self, kv: Any, pages: int) -> tuple[int, ...]:
        """Of an export."""
        return (len(kv[0]), len(each_array(kv)), pages, *kv[0][0].shape[1:])

    def _write(self, kv: Any, pages: list[int], data: Arr) -> Any:
        for i, parts in enumerate(each_array(kv)):
            for x, new in zip(parts, data[:, i], strict=True):
                x[pages] = new
        return kv


def _logprobs(logits: Arr, tokens: Arr, top: int) -> tuple[Any, ...]:
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    logp = (x - np.log(np.exp(x).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top].astype(np.int32)
    rows = np.arange(len(logp))
    return logp[rows, tokens], ids, np.take_along_axis(logp, ids, axis=1)
