"""The verbs in JAX, traced inside one shard_map: every array is a rank's own. Products take values as they are and sum
in float32; everything else is float32 inside and rounded once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import (
    AttnSpec,
    Collectives,
    Gate,
    Heads,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    LayerBody,
    MoeSpec,
    MoeWeights,
)
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels import XLA, Kernels
from polyradix_tpu.kernels.mla_attention import sparse
from polyradix_tpu.kernels.xla import precision, write_rows
from polyradix_tpu.mesh import AXIS, Grouped, LayerKV, Packed
from polyradix_tpu.moe import clamped, route, spread, with_bias


def _gelu(x: jax.Array) -> jax.Array:
    """By its tanh form, as a sigmoid: 1 + tanh loses the digits of small values."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


_GATES = {"silu": jax.nn.silu, "gelu_tanh": _gelu}


class JaxOps(Expansions):
    """A layer's KV is an array [pages, page, 2*Hk, D], or [pages, page, W] if it is latent; see kernels. Of a cache in
    groups it is a LayerKV."""

    def __init__(self, collectives: Collectives, kernels: Kernels) -> None:
        self._collectives, self._kernels = collectives, kernels

    def embed(self, w: Packed, m: JaxMeta) -> jax.Array:
        return w.value[m.tokens]

    def linear(self, x: jax.Array, w: Packed) -> jax.Array:
        return _biased(_product(x, w), w).astype(x.dtype)

    def linear_reduce(self, x: jax.Array, w: Packed) -> jax.Array:
        part = _product(x, w)
        total = part if w.axis is None else self._collectives.all_reduce(part)
        return _biased(total, w).astype(x.dtype)

    def qkv(self, x: jax.Array, w: Packed, heads: Heads) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = self._local(heads)
        rows = self.linear(x, w).reshape(len(x), -1, heads.dim)
        q, k, v = jnp.split(rows, [heads.q, heads.q + heads.kv], axis=1)
        return q, k, v

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return (_wide(x) + _wide(y)).astype(x.dtype)

    def rms_norm(self, x: jax.Array, w: Packed, eps: float) -> jax.Array:
        f = _wide(x)
        root = jnp.sqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
        scale = 1 / jax.lax.optimization_barrier(root)  # else XLA makes it rsqrt, which is off by too much
        return (f * scale * _wide(w.value)).astype(x.dtype)

    def rope(self, q: jax.Array, k: jax.Array, table: Packed, m: JaxMeta) -> tuple[jax.Array, jax.Array]:
        cos, sin = jnp.split(table.value[m.positions][:, None, :], 2, axis=-1)  # [T,1,D/2] each
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, m: JaxMeta, a: AttnSpec
    ) -> tuple[jax.Array, Any]:
        if isinstance(kv, LayerKV):
            out, array = self.attend(q, k, v, kv.array, m.of(kv.group), a)
            return out, replace(kv, array=array)
        kernels = XLA if kv.dtype == jnp.float8_e4m3fn else self._kernels  # Pallas' have no such cache
        kv = kernels.write(k, v, kv, m)
        sinks = None if a.sinks is None else a.sinks.value
        out = kernels.attend(q, kv, m, replace(a, heads=self._local(a.heads), sinks=sinks))
        return out.reshape(len(q), -1), kv

    def attend_latent(
        self, q: jax.Array, c: jax.Array, kv: jax.Array, m: JaxMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[jax.Array, jax.Array]:

        def over(asked: jax.Array, turned: jax.Array, kv: jax.Array) -> jax.Array:
            return self._kernels.latent(asked, turned, kv, m, a.scale)

        return self._over_rows(q, c, c[:, :0], kv, m, w, a, over)

    def attend_sparse(
        self,
        q: jax.Array,
        c: jax.Array,
        x: Index,
        kv: jax.Array,
        m: JaxMeta,
        w: LatentWeights,
        a: LatentSpec,
        s: IndexSpec,
    ) -> tuple[jax.Array, jax.Array]:
        key, index = _layer_norm(x.k, x.norm, s.eps), x.q.reshape(len(q), s.heads, s.dim)
        turned, first = self.rope(index[..., : a.rope], key[:, None, : a.rope], w.table, m)
        index = jnp.concatenate([turned, index[..., a.rope :]], axis=2)
        key = jnp.concatenate([first[:, 0], key[:, a.rope :]], axis=1)

        def over(asked: jax.Array, turned: jax.Array, kv: jax.Array) -> jax.Array:
            if m.shape.pages * kv.shape[1] <= s.top_k:  # every row is seen
                return self._kernels.latent(asked, turned, kv, m, a.scale)
            q = jnp.concatenate([asked, turned], axis=2)
            return sparse.attend(q, index, _wide(x.weights), kv, m, a, s, self._kernels.scores)

        return self._over_rows(q, c, key, kv, m, w, a, over)

    def _over_rows(
        self,
        q: jax.Array,
        c: jax.Array,
        index: jax.Array,
        kv: jax.Array,
        m: JaxMeta,
        w: LatentWeights,
        a: LatentSpec,
        over: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Writes the rows of c, each followed by that of `index`; `over` is attention over them, in the absorbed form
        whatever the batch: kernels know latent rows alone."""
        q = q.reshape(len(q), -1, a.nope + a.rope)
        turned, key = self.rope(q[..., a.nope :], c[:, None, a.rank :], w.table, m)
        rows = jnp.concatenate([self.rms_norm(c[:, : a.rank], w.norm, a.eps), key[:, 0], index], axis=1)
        kv = write_rows(rows, kv, m)
        asked = _per_head("thn,hnr->thr", q[..., : a.nope], w.up.value[:, : a.nope])
        warm = (1 + a.attn_scale * jnp.log1p(m.positions // a.floor_scale))[:, None, None]
        asked, turned = ((warm * x).astype(kv.dtype) for x in (asked, turned))
        out = _per_head("thr,hvr->thv", over(asked, turned, kv), w.up.value[:, a.nope :])
        return out.astype(q.dtype).reshape(len(q), -1), kv

    def gated(self, x: jax.Array, kind: Gate) -> jax.Array:
        if kind not in _GATES:
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(_GATES)}")
        gate, up = jnp.split(_wide(x), 2, axis=-1)
        return (_GATES[kind](gate) * up).astype(x.dtype)

    def moe(self, x: jax.Array, w: MoeWeights, s: MoeSpec) -> jax.Array:
        ids, weights = route(_product(x, w.router), w.router.bias, s)
        split, here = w.down.axis is not None and self._collectives.size > 1, len(w.down.value)

        def run(rows: jax.Array, sizes: jax.Array) -> jax.Array:
            inner = with_bias(self._kernels.grouped(rows, w.gate_up.value, sizes), w.gate_up.bias, sizes)
            inner = self.gated(inner, "silu") if s.limit is None else clamped(inner, s)
            return with_bias(self._kernels.grouped(inner, w.down.value, sizes), w.down.bias, sizes)

        total = spread(x, ids, weights, jax.lax.axis_index(AXIS) * here if split else 0, here, run)
        return (self._collectives.all_reduce(total) if split else total).astype(x.dtype)

    def last(self, x: jax.Array, m: JaxMeta) -> jax.Array:
        return x[m.last]

    def logits(self, x: jax.Array, w: Packed, softcap: float | None = None) -> jax.Array:
        part = _biased(_product(x, w), w)
        whole = part if w.axis is None else self._collectives.all_gather(part, 1)
        out = whole[:, : w.rows]  # the last shards end with padding
        return out if softcap is None else softcap * jnp.tanh(out / softcap)

    def layers(self, bodies: Sequence[LayerBody], params: Sequence[Any], carry: Any, kv: Any) -> tuple[Any, Any]:
        """Unrolled; layers of the same body and shapes are traced once."""
        traced = {body: jax.jit(body) for body, uses in Counter(bodies).items() if uses > 1}
        bodies = [traced.get(body, body) for body in bodies]
        if not isinstance(kv, Grouped):
            return super().layers(bodies, params, carry, kv)
        arrays = list(kv.arrays)
        for body, layer, (group, at) in zip(bodies, params, kv.places, strict=True):
            carry, held = body(layer, carry, LayerKV(arrays[at], group))
            arrays[at] = held.array
        return carry, replace(kv, arrays=arrays)

    def _local(self, heads: Heads) -> Heads:
        """This rank's share."""
        return Heads(heads.q // self._collectives.size, heads.kv // self._collectives.size, heads.dim)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _layer_norm(x: jax.Array, w: Packed, eps: float) -> jax.Array:
    off = _wide(x) - jnp.mean(_wide(x), axis=-1, keepdims=True)
    root = jnp.sqrt(jnp.mean(off * off, axis=-1, keepdims=True) + eps)
    scale = 1 / jax.lax.optimization_barrier(root)  # as in rms_norm
    return _biased(off * scale * _wide(w.value), w).astype(x.dtype)


def _product(x: jax.Array, w: Packed) -> jax.Array:
    """x w^T, float32, of values in the dtype of the weight."""
    x, contract = x.astype(w.value.dtype), (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.value, contract, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _per_head(form: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """In the dtype of w: summed in float32 all the same, and XLA's CPU has no such product that stays float32."""
    return jnp.einsum(form, x.astype(w.dtype), w, precision=precision(w.dtype))


def _biased(product: jax.Array, w: Packed) -> jax.Array:
    return product if w.bias is None else product + _wide(w.bias)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(_wide(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
