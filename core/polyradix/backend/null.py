"""A backend that computes nothing, so that the scheduler, the server and the gateway can be tested at any speed.

Samples are a hash of (seed, position), so a request's tokens do not depend on its batch. KV pages read as zeros.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyradix.backend.alone import Alone
from polyradix.backend.batch import I32, HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, KV_GROUPS, Capabilities, Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.launch import Launcher
from polyradix.backend.protocol import (
    HOST_DTYPES,
    KV,
    Array,
    AttnSpec,
    Collectives,
    Compiled,
    Found,
    Gate,
    Heads,
    HostArray,
    Index,
    IndexSpec,
    KVSpec,
    LatentSpec,
    LatentWeights,
    LayerBody,
    Limits,
    LogProbs,
    Memory,
    Meta,
    MoeSpec,
    MoeWeights,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix.backend.sampling import mix


@dataclass(frozen=True)
class NullKV:
    spec: KVSpec
    pages: int


class NullOps(Expansions):
    """Every verb hands on its input."""

    def embed(self, w: Weight, m: Meta) -> Array:
        return None

    def linear(self, x: Array, w: Weight) -> Array:
        return x

    def linear_reduce(self, x: Array, w: Weight) -> Array:
        return x

    def qkv(self, x: Array, w: Weight, heads: Heads) -> tuple[Array, Array, Array]:
        return x, x, x

    def add(self, x: Array, y: Array) -> Array:
        return x

    def rms_norm(self, x: Array, w: Weight, eps: float) -> Array:
        return x

    def rope(self, q: Array, k: Array, table: Weight, m: Meta) -> tuple[Array, Array]:
        return q, k

    def attend(self, q: Array, k: Array, v: Array, kv: KV, m: Meta, a: AttnSpec) -> tuple[Array, KV]:
        return q, kv

    def attend_latent(self, q: Array, c: Array, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec) -> tuple[Array, KV]:
        return q, kv

    def attend_sparse(
        self, q: Array, c: Array, x: Index, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Array, KV]:
        return q, kv

    def gated(self, x: Array, kind: Gate) -> Array:
        return x

    def moe(self, x: Array, w: MoeWeights, s: MoeSpec) -> Array:
        return x

    def last(self, x: Array, m: Meta) -> Array:
        return x

    def logits(self, x: Array, w: Weight, softcap: float | None = None) -> Array:
        return x

    def layers(
        self, bodies: Sequence[LayerBody], params: Sequence[dict[str, Weight]], carry: Any, kv: KV
    ) -> tuple[Any, KV]:
        return carry, kv


class NullBackend:
    """`step_time_s` seconds are slept per step, on the worker thread with `async_launch`."""

    ops: Ops
    collectives: Collectives

    def __init__(self, step_time_s: float, async_launch: bool) -> None:
        self._step_time_s = step_time_s
        self._launch = Launcher(async_launch)
        self._vocab = 1
        self.ops = NullOps()
        self.collectives = Alone()
        self.caps = Capabilities(
            name="null",
            device="none, computes nothing",
            dtypes=frozenset(HOST_DTYPES),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=1024,
            features=FEATURES - {"mask", "adjust"} | {KV_GROUPS},
            batch_invariant=True,
            async_launch=async_launch,
        )

    def memory(self) -> Memory:
        return Memory(free=1 << 34, total=1 << 34)

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        if spec.kind in ("embed", "logits"):
            self._vocab = spec.shape[0]
        return None

    def kv_page_bytes(self, spec: KVSpec) -> int:
        per_token = spec.parts * spec.depth * spec.kv_heads * spec.head_dim
        return per_token * spec.page_size * HOST_DTYPES[spec.dtype].itemsize

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        return NullKV(spec, pages)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta:
        return batch

    def compile(self, step: Step, limits: Limits) -> Compiled:
        def run(params: Params, kv: KV, meta: HostBatch) -> tuple[Array, KV]:
            return self._launch.run(self._step, meta.num_seqs), kv

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        if batch.mask is not None:
            raise Unsupported("mask")
        if batch.adjust is not None:
            raise Unsupported("adjust")
        return self._launch.run(lambda _: self._tokens(batch), logits)

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        return LogProbs(*self._launch.split(lambda t: self._logprobs(len(t), top), 3, tokens))

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return kv

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        s = kv.spec
        shape = (s.parts, s.depth, len(pages), s.page_size, s.kv_heads, s.head_dim)
        return self._launch.future(np.zeros, shape, HOST_DTYPES[s.dtype])

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        return kv

    def fetch(self, x: Array) -> Future[HostArray]:
        return self._launch.future(np.copy, x)

    def _step(self, rows: int) -> HostArray:
        if self._step_time_s:
            time.sleep(self._step_time_s)
        return np.zeros((rows, 1), np.float32)  # a handle only: sampling does not read it

    def _tokens(self, batch: SampleBatch) -> I32:
        with np.errstate(over="ignore"):
            h = mix(mix(batch.seed.astype(np.uint32)) ^ batch.position.astype(np.uint32))
        return (h % np.uint32(self._vocab)).astype(np.int32)

    def _logprobs(self, rows: int, top: int) -> tuple[HostArray, HostArray, HostArray]:
        ids = np.tile(np.arange(top, dtype=np.int32), (rows, 1))
        return np.zeros(rows, np.float32), ids, np.zeros((rows, top), np.float32)


class NullEntry:
    protocol = (1, 0)

    def probe(self) -> Found:
        return Found(True, "computes nothing; for tests of everything else", rank=-1)

    def create(self, *, step_time_s: float = 0.0, async_launch: bool = False) -> NullBackend:
        """`step_time_s` seconds pass per step; `async_launch` makes them pass on a thread."""
        return NullBackend(step_time_s, async_launch)


entry = NullEntry()
