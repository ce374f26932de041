"""What one step of a model moves and computes, found by running its graph over numbers of rows: no weight is read.

Bytes: every weight and every row of the cache that is seen once, new rows, embedded ones, logits; activations need not
leave the chip. Operations: those of products and of attention, a multiply and an add being two. Both are of one of `tp`
ranks; what ranks tell each other is not counted. Of experts, as many are read as are hit if tokens choose evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import (
    HOST_DTYPES,
    KV,
    KV_DTYPES,
    AttnSpec,
    Gate,
    Heads,
    Index,
    IndexSpec,
    KVSpec,
    LatentSpec,
    LatentWeights,
    MoeSpec,
    MoeWeights,
    Ops,
    Params,
    ParamSpec,
)
from polyradix.graph.dense import ParamTable, make_step
from polyradix.graph.spec import ModelSpec

Rows = int  # what an Array is here


@dataclass(frozen=True)
class Batch:
    """`seqs` sequences, of which each computes its newest `new` tokens and then holds `context`."""

    seqs: int
    new: int
    context: int


@dataclass(frozen=True)
class Cost:
    bytes: int
    flops: int
    verbs: frozenset[str] = frozenset()  # that the graph uses


def trace(spec: ModelSpec, table: ParamTable, kv: KVSpec, batch: Batch, tp: int = 1) -> Cost:
    """Of one step of a model whose parameters are `table`."""
    tally = _Tally(batch, tp)
    ops: Any = _Named(tally)
    params = Params({p.name: p for p in table.top}, [{p.name: p for p in layer} for layer in table.layers])
    make_step(spec)(ops, params, [kv] * spec.layers, None)
    return Cost(round(tally.bytes), round(tally.flops), frozenset(ops.names))


class _Named:
    """Notes which verbs are asked for."""

    def __init__(self, ops: Ops) -> None:
        self._ops, self.names = ops, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._ops, name)


class _Tally(Expansions):
    """Ops whose arrays are their numbers of rows, whose weights are ParamSpecs, and whose cache is a KVSpec a layer."""

    def __init__(self, batch: Batch, tp: int) -> None:
        self.batch, self.tp = batch, tp
        self.bytes = self.flops = 0.0

    def embed(self, w: ParamSpec, m: Any) -> Rows:
        rows = self.batch.seqs * self.batch.new
        self.bytes += rows * w.shape[1] * HOST_DTYPES[w.dtype].itemsize
        return rows

    def linear(self, x: Rows, w: ParamSpec) -> Rows:
        self._product(x, w)
        return x

    linear_reduce = linear

    def qkv(self, x: Rows, w: ParamSpec, heads: Heads) -> tuple[Rows, Rows, Rows]:
        self._product(x, w)
        return x, x, x

    def add(self, x: Rows, y: Rows) -> Rows:
        return x

    def rms_norm(self, x: Rows, w: ParamSpec, eps: float) -> Rows:
        return x

    def rope(self, q: Rows, k: Rows, table: ParamSpec, m: Any) -> tuple[Rows, Rows]:
        return q, k

    def attend(self, q: Rows, k: Rows, v: Rows, kv: KVSpec, m: Any, a: AttnSpec) -> tuple[Rows, KV]:
        held = min(self.batch.context, (a.window or self.batch.context) + self.batch.new - 1)
        self._cache(2 * (self.batch.seqs * held + q), a.heads.kv * a.heads.dim / self.tp, kv)
        self.flops += 4 * self._pairs(a.window) * a.heads.q * a.heads.dim / self.tp
        return q, kv

    def attend_latent(self, q: Rows, c: Rows, kv: KVSpec, m: Any, w: LatentWeights, a: LatentSpec) -> tuple[Rows, KV]:
        """In the form with fewer operations."""
        self._cache(self._context + q, kv.head_dim, kv)
        made = self._context * a.rank * (a.nope + a.v) + self._pairs() * (a.nope + a.rope + a.v)
        self._latent(w, a, min(made, self._absorbed(q, self._pairs(), a)))
        return q, kv

    def attend_sparse(
        self, q: Rows, c: Rows, x: Index, kv: KVSpec, m: Any, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Rows, KV]:
        seen = self._pairs(s.top_k)
        self._cache(self._context, s.dim, kv)
        self._cache(min(seen, self._context), a.rank + a.rope, kv)
        self._cache(q, kv.head_dim, kv)
        self.flops += 2 * self._pairs() * s.heads * (s.dim + 1)
        self._latent(w, a, self._absorbed(q, seen, a))
        return q, kv

    def gated(self, x: Rows, kind: Gate) -> Rows:
        return x

    def moe(self, x: Rows, w: MoeWeights, s: MoeSpec) -> Rows:
        self._product(x, w.router)
        hit = 1 - (1 - s.top_k / s.experts) ** x
        for each in (w.gate_up, w.down):
            self.bytes += each.bytes * hit / self.tp
            self.flops += 2 * x * s.top_k * prod(each.shape[1:]) / self.tp
        return x

    def last(self, x: Rows, m: Any) -> Rows:
        return self.batch.seqs

    def logits(self, x: Rows, w: ParamSpec, softcap: float | None = None) -> Rows:
        self._product(x, w)
        self.bytes += x * w.shape[0] * 4
        return x

    def _product(self, rows: Rows, w: ParamSpec) -> None:
        ranks = 1 if w.shard_axis is None else self.tp
        self.bytes += w.bytes / ranks
        self.flops += 2 * rows * prod(w.shape) / ranks

    def _cache(self, rows: float, width: float, kv: KVSpec) -> None:
        self.bytes += rows * width * KV_DTYPES[kv.dtype].itemsize

    @property
    def _context(self) -> int:
        """Rows that the sequences hold."""
        return self.batch.seqs * self.batch.context

    def _pairs(self, most: int | None = None) -> int:
        """Of a query and a row that it sees, at most `most` a query."""
        b = self.batch
        seen = np.arange(b.context - b.new + 1, b.context + 1)
        return b.seqs * int(np.minimum(seen, most or b.context).sum())

    def _absorbed(self, rows: Rows, pairs: int, a: LatentSpec) -> int:
        """Multiplications per head."""
        return rows * a.rank * (a.nope + a.v) + pairs * (2 * a.rank + a.rope)

    def _latent(self, w: LatentWeights, a: LatentSpec, multiplications: int) -> None:
        self.bytes += w.up.bytes / self.tp
        self.flops += 2 * multiplications * a.heads / self.tp
