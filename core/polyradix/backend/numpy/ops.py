"""The verbs in NumPy. Each computes in float32 (or float64) from its inputs and rounds once to the dtype of its input.

A result never depends on the batch: products are per row and attention is per query row, so every sum has the same
order whatever else is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from polyradix.backend.alone import Alone
from polyradix.backend.batch import I32, HostBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.launch import resolve
from polyradix.backend.layered import LayerKV
from polyradix.backend.numpy.moe import chosen, scores
from polyradix.backend.protocol import (
    FLOAT8_MAX,
    AttnSpec,
    Collectives,
    Gate,
    Heads,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    MoeSpec,
    MoeWeights,
    ParamSpec,
)

Arr: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_SLOPES: dict[str, Callable[[Arr], Arr]] = {  # what the sigmoid of a gate is of
    "silu": lambda x: x,
    "gelu_tanh": lambda x: 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3),
}


@dataclass(frozen=True)
class Packed:
    """One parameter, rounded to its spec's dtype and held in the compute dtype; of a mesh, one rank's shard of it."""

    spec: ParamSpec
    value: Arr
    bias: Arr | None = None
    first: int = 0  # of experts: the id of the first one here


class NumpyMeta:
    """A batch, and the previous step's samples that some of its tokens come from."""

    def __init__(self, batch: HostBatch, prev: Any) -> None:
        self.batch, self.groups = batch, batch.by_group
        self._prev = prev

    def tokens(self) -> I32:
        """[T] with the samples of the previous step put in."""
        b = self.batch
        if self._prev is None:
            return b.tokens
        return np.where(b.from_prev >= 0, resolve(self._prev)[b.from_prev], b.tokens)


class NumpyOps(Expansions):
    """`wide` is the dtype of every computation; `store` maps a spec's dtype to that of activations. Ranks share one
    NumpyOps: whatever differs between them is in the arrays and the collectives."""

    def __init__(
        self, wide: np.dtype[Any], store: dict[str, np.dtype[Any]], collectives: Collectives | None = None
    ) -> None:
        self._wide = wide
        self._store = store
        self._collectives = collectives or Alone()

    def embed(self, w: Packed, m: NumpyMeta) -> Arr:
        return w.value[m.tokens()].astype(self._store[w.spec.dtype])

    def linear(self, x: Arr, w: Packed) -> Arr:
        return _rounded(_biased(self._product(x, w), w), x)

    def linear_reduce(self, x: Arr, w: Packed) -> Arr:
        part = self._product(x, w)
        total = part if w.spec.shard_axis is None else self._collectives.all_reduce(part)
        return _rounded(_biased(total, w), x)

    def qkv(self, x: Arr, w: Packed, heads: Heads) -> tuple[Arr, Arr, Arr]:
        heads = self._local(heads)
        rows = self.linear(x, w).reshape(len(x), heads.q + 2 * heads.kv, heads.dim)
        q, k, v = np.split(rows, [heads.q, heads.q + heads.kv], axis=1)
        return q, k, v

    def add(self, x: Arr, y: Arr) -> Arr:
        return _rounded(x.astype(self._wide) + y.astype(self._wide), x)

    def rms_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        f = np.ascontiguousarray(x, self._wide)
        mean = np.mean(f * f, axis=-1, keepdims=True)
        return _rounded(f / np.sqrt(mean + self._wide.type(eps)) * w.value, x)

    def rope(self, q: Arr, k: Arr, table: Packed, m: NumpyMeta) -> tuple[Arr, Arr]:
        cos, sin = np.split(table.value[m.batch.positions][:, None, :], 2, axis=-1)  # [T,1,D/2] each
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def attend(self, q: Arr, k: Arr, v: Arr, kv: LayerKV[Arr], m: NumpyMeta, a: AttnSpec) -> tuple[Arr, LayerKV[Arr]]:
        b, a = m.groups[kv.group], replace(a, heads=self._local(a.heads))
        keys, values = kv
        page_size = keys.shape[1]
        keys[b.slots // page_size, b.slots % page_size] = self._held(k, keys.dtype)
        values[b.slots // page_size, b.slots % page_size] = self._held(v, values.dtype)
        out = np.empty(q.shape, q.dtype)
        for s in range(b.num_seqs):
            pages = b.pages[s, : -(-int(b.kv_len[s]) // page_size)]
            ks, vs = (x[pages].reshape(-1, *x.shape[2:]).astype(self._wide) for x in (keys, values))
            for t in range(b.cu_q[s], b.cu_q[s + 1]):
                out[t] = self._attend_row(q[t], ks, vs, int(b.positions[t]), a)
        return out.reshape(len(q), -1), kv

    def attend_latent(
        self, q: Arr, c: Arr, kv: tuple[Arr], m: NumpyMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Arr, tuple[Arr]]:
        return self._attend_rows(q, c, c[:, :0], kv, m, w, a, lambda t, held: held)

    def attend_sparse(
        self, q: Arr, c: Arr, x: Index, kv: tuple[Arr], m: NumpyMeta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Arr, tuple[Arr]]:
        key, asked = self._layer_norm(x.k, x.norm, s.eps), x.q.reshape(len(q), s.heads, s.dim)
        turned = self.rope(asked[..., : a.rope], key[:, None, : a.rope], w.table, m)
        key = np.concatenate([turned[1][:, 0], key[:, a.rope :]], axis=1)
        asked = np.concatenate([turned[0], asked[..., a.rope :]], axis=2).astype(self._wide)
        weights = x.weights.astype(self._wide)

        def select(t: int, held: Arr) -> Arr:
            return held[self._selected(asked[t], weights[t], held[: m.batch.positions[t] + 1, -s.dim :], s.top_k)]

        return self._attend_rows(q, c, key, kv, m, w, a, select)

    def gated(self, x: Arr, kind: Gate) -> Arr:
        if kind not in _SLOPES:
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(_SLOPES)}")
        gate, up = (np.ascontiguousarray(half, self._wide) for half in np.split(x, 2, axis=-1))
        with np.errstate(over="ignore"):
            return _rounded(gate / (1 + np.exp(-_SLOPES[kind](gate))) * up, x)

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        ids, weights = self._route(x, w.router, s)
        total = np.zeros(x.shape, self._wide)
        for i in range(len(w.down.value)):
            gate_up, down = _one(w.gate_up, i), _one(w.down, i)
            rows, place = np.nonzero(ids == w.down.first + i)
            inner = self._gate(self.linear(x[rows], gate_up), s)
            total[rows] += weights[rows, place, None] * _biased(self._product(inner, down), down)
        whole = total if w.down.spec.shard_axis is None else self._collectives.all_reduce(total)
        return _rounded(whole, x)

    def last(self, x: Arr, m: NumpyMeta) -> Arr:
        return x[m.batch.last]

    def logits(self, x: Arr, w: Packed, softcap: float | None = None) -> Arr:
        part = _biased(self._product(x, w), w)
        whole = part if w.spec.shard_axis is None else self._collectives.all_gather(part, 1)
        return self._capped(whole[:, : w.spec.shape[0]], softcap)  # the last shards end with padding

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        """Ids of the chosen experts [T,top_k], and their weights."""
        logits = self._product(x, router)
        score = scores(_biased(logits, router) if s.bias == "logits" else logits, s)
        ids = chosen(_biased(score, router) if s.bias == "choice" else score, s)
        weights = np.take_along_axis(score, ids, axis=1)
        if s.renormalise:
            weights = weights / (weights.sum(axis=1, keepdims=True) + self._wide.type(1e-20))
        return ids, weights * self._wide.type(s.scale)

    def _gate(self, x: Arr, s: MoeSpec) -> Arr:
        if s.limit is None:
            return self.gated(x, "silu")
        gate, up = np.split(x.astype(self._wide), 2, axis=-1)
        gate, up = np.minimum(gate, s.limit), np.clip(up, -s.limit, s.limit)
        with np.errstate(over="ignore"):
            return _rounded(gate / (1 + np.exp(-s.alpha * gate)) * (up + 1), x)

    def _held(self, x: Arr, dtype: np.dtype[Any]) -> Arr:
        """As a cache of this dtype holds it."""
        wide = x.astype(self._wide)
        return (wide.clip(-FLOAT8_MAX, FLOAT8_MAX) if dtype.itemsize == 1 else wide).astype(dtype)

    def _local(self, heads: Heads) -> Heads:
        """This rank's share."""
        return Heads(heads.q // self._collectives.size, heads.kv // self._collectives.size, heads.dim)

    def _product(self, x: Arr, w: Packed) -> Arr:
        """x w^T, unrounded. A matrix product would sum in an order that depends on the number of rows."""
        out: Arr = np.empty((len(x), len(w.value)), self._wide)
        for t, row in enumerate(x.astype(self._wide)):
            out[t] = w.value @ row
        return out

    def _rotate(self, x: Arr, cos: Arr, sin: Arr) -> Arr:
        first, second = np.split(x.astype(self._wide), 2, axis=-1)
        return _rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), x)

    def _attend_row(self, q: Arr, keys: Arr, values: Arr, position: int, a: AttnSpec) -> Arr:
        """One query row q [Hq,D] over keys and values [L,Hk,D] in sequence order; returns [Hq,D], unrounded."""
        seen = slice(max(0, position + 1 - a.window) if a.window is not None else 0, position + 1)
        k = np.ascontiguousarray(keys[seen].transpose(1, 0, 2))  # [Hk,L,D]
        v = np.ascontiguousarray(values[seen].transpose(1, 0, 2))
        group = q.astype(self._wide).reshape(a.heads.kv, -1, a.heads.dim)  # [Hk,G,D]: query head h reads kv head h // G
        score = (group @ k.transpose(0, 2, 1)) * self._wide.type(a.scale)  # [Hk,G,L]
        score = self._capped(score, a.softcap)
        top = score.max(axis=-1, keepdims=True)
        if a.sinks is None:
            p = np.exp(score - top)
            total = p.sum(axis=-1, keepdims=True)
        else:
            sinks = a.sinks.value.reshape(a.heads.kv, -1, 1)
            top = np.maximum(top, sinks)
            p = np.exp(score - top)
            total = p.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
        out: Arr = (p / total) @ v
        return out.reshape(a.heads.q, a.heads.dim)

    def _attend_rows(
        self,
        q: Arr,
        c: Arr,
        key: Arr,
        kv: tuple[Arr],
        m: NumpyMeta,
        w: LatentWeights,
        a: LatentSpec,
        select: Callable[[int, Arr], Arr],
    ) -> tuple[Arr, tuple[Arr]]:
        """Writes the rows of c, each followed by that of key; then token t sees of the rows of its sequence those that
        `select` gives it."""
        b, (rows,) = m.batch, kv
        page_size = rows.shape[1]
        q = q.reshape(len(q), -1, a.nope + a.rope)
        q_rope, k = self.rope(q[..., a.nope :], c[:, None, a.rank :], w.table, m)
        new = np.concatenate([self.rms_norm(c[:, : a.rank], w.norm, a.eps), k[:, 0], key], axis=1)
        rows[b.slots // page_size, b.slots % page_size, 0] = new
        out = np.empty((*q.shape[:2], a.v), q.dtype)
        for s in range(b.num_seqs):
            held = rows[b.pages[s, : -(-int(b.kv_len[s]) // page_size)]].reshape(-1, rows.shape[3]).astype(self._wide)
            for t in range(b.cu_q[s], b.cu_q[s + 1]):
                seen = select(t, held)[:, : a.rank + a.rope]
                out[t] = self._latent_row(q[t, :, : a.nope], q_rope[t], seen, int(b.positions[t]), w.up.value, a)
        return out.reshape(len(q), -1), kv

    def _layer_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        f = np.ascontiguousarray(x, self._wide)
        f = f - f.mean(axis=-1, keepdims=True)
        root = np.sqrt(np.mean(f * f, axis=-1, keepdims=True) + self._wide.type(eps))
        return _rounded(_biased(f / root * w.value, w), x)

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        """Of one query q [heads,dim] with weights [heads]: which of keys [L,dim] it sees, in their order."""
        score = weights @ np.maximum(q @ np.ascontiguousarray(keys).T, 0)
        return np.sort(np.argsort(-score, kind="stable")[:top_k])

    def _capped(self, x: Arr, softcap: float | None) -> Arr:
        return x if softcap is None else self._wide.type(softcap) * np.tanh(x / self._wide.type(softcap))

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        """One query [Hq,nope], [Hq,rope] over rows [L,rank+rope] in sequence order, absorbed: [Hq,v], unrounded."""
        seen = np.ascontiguousarray(held[: position + 1])
        absorbed = (nope.astype(self._wide)[:, None] @ up[:, : a.nope])[:, 0]  # [Hq,rank]
        score = np.concatenate([absorbed, rope.astype(self._wide)], axis=1) @ seen.T  # [Hq,L]
        score = score * self._wide.type(a.scale * (1 + a.attn_scale * math.log(1 + position // a.floor_scale)))
        p = np.exp(score - score.max(axis=-1, keepdims=True))
        mean = (p / p.sum(axis=-1, keepdims=True)) @ np.ascontiguousarray(seen[:, : a.rank])
        out: Arr = (up[:, a.nope :] @ mean[..., None])[..., 0]
        return out


def _one(w: Packed, expert: int) -> Packed:
    """Of `experts`, as a linear's."""
    return replace(w, value=w.value[expert], bias=None if w.bias is None else w.bias[expert])


def _biased(product: Arr, w: Packed) -> Arr:
    return product if w.bias is None else product + w.bias


def _rounded(value: Arr, like: Arr) -> Arr:
    return value.astype(like.dtype)
