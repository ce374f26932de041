"""Verbs with a wrong formula, a lost part or the wrong precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.numpy.ops import Arr, NumpyMeta, NumpyOps, Packed
from polyradix.backend.protocol import HOST_DTYPES, Heads
from polyradix_conformance.sabotage import sabotage
from polyradix_conformance.sabotage.attention import changed


@sabotage("L1/rope")
class RopeBackwards(NumpyOps):
    """Rope turns the wrong way."""

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        return super()._rotate(x, cos, -sin)


@sabotage("L1/rope")
class RopeHalvesSwapped(NumpyOps):
    """The halves of the rope table are taken as sin, cos."""

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        return super()._rotate(x, sin, cos)


@sabotage("L1/rope")
class RopeInterleaved(NumpyOps):
    """Rope pairs dimension 2 i with 2 i + 1."""

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        split = super()._rotate(np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), cos, sin)
        return np.stack(np.split(split, 2, axis=-1), axis=-1).reshape(x.shape)


@sabotage("L1/rope")
class RopeKeyUnturned(NumpyOps):
    """Rope turns q alone."""

    def rope(self, q: Any, k: Any, table: Packed, m: NumpyMeta) -> Any:
        return super().rope(q, k, table, m)[0], k


@sabotage("L2/meta/split")
class RopeFromRow(NumpyOps):
    """Rope takes a token's row in the batch for its position."""

    def rope(self, q: Any, k: Any, table: Packed, m: NumpyMeta) -> Any:
        return super().rope(q, k, table, changed(m, positions=np.arange(len(q))))


@sabotage("L1/linear/bias")
class BiasIgnored(NumpyOps):
    """A linear leaves its bias out."""

    def linear(self, x: Arr, w: Packed) -> Arr:
        return super().linear(x, replace(w, bias=None))


@sabotage("L1/linear_reduce/bias")
class BiasTwice(NumpyOps):
    """A reduced linear adds its bias twice."""

    def linear_reduce(self, x: Arr, w: Packed) -> Arr:
        return super().linear_reduce(x, w if w.bias is None else replace(w, bias=2 * w.bias))


@sabotage("L1/linear/normal")
class InputTail(NumpyOps):
    """A linear leaves out input columns beyond a multiple of 32."""

    def _product(self, x: Arr, w: Packed) -> Arr:
        n = x.shape[1] // 32 * 32 or x.shape[1]
        return super()._product(x[:, :n], replace(w, value=w.value[:, :n]))


@sabotage("L1/linear/normal")
class OutputTail(NumpyOps):
    """A linear gives zeros in output columns beyond a multiple of 32."""

    def linear(self, x: Arr, w: Packed) -> Arr:
        out = super().linear(x, w)
        out[:, out.shape[1] // 32 * 32 or None :] = 0
        return out


@sabotage("L1/linear/normal")
class RowTail(NumpyOps):
    """A linear gives zeros in rows beyond a multiple of 32."""

    def linear(self, x: Arr, w: Packed) -> Arr:
        out = super().linear(x, w)
        out[len(x) // 32 * 32 or None :] = 0
        return out


@sabotage("L1/qkv")
class QkvGrouped(NumpyOps):
    """The rows of qkv are taken as q, k, v of one kv head after the other."""

    def qkv(self, x: Arr, w: Packed, heads: Heads) -> Any:
        rows = self.linear(x, w).reshape(len(x), heads.kv, -1, heads.dim)
        q, k, v = np.split(rows, [heads.q // heads.kv, heads.q // heads.kv + 1], axis=2)
        return tuple(part.reshape(len(x), -1, heads.dim) for part in (q, k, v))


@sabotage("L1/rms_norm")
class NormWithoutEps(NumpyOps):
    """A norm leaves eps out."""

    def rms_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        return super().rms_norm(x, w, 0.0)


@sabotage("L1/rms_norm")
class NormCentred(NumpyOps):
    """A norm subtracts the mean first."""

    def rms_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        f = x.astype(np.float32)
        return super().rms_norm((f - f.mean(axis=-1, keepdims=True)).astype(x.dtype), w, eps)


@sabotage("L1/rms_norm")
class NormNarrow(NumpyOps):
    """The statistics of a norm are summed in bfloat16."""

    def rms_norm(self, x: Arr, w: Packed, eps: float) -> Any:
        f = x.astype(np.float32)
        squares = np.cumsum((f * f).astype(HOST_DTYPES["bfloat16"]), axis=-1)[..., -1:].astype(np.float32)
        return (f / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(eps)) * w.value).astype(x.dtype)


@sabotage("L1/qk_norm")
class NormOverHeads(NumpyOps):
    """A norm of q or k has one mean for all heads of a token."""

    def rms_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        flat = replace(w, value=np.tile(w.value, x.size // len(x) // len(w.value)))
        return super().rms_norm(x.reshape(len(x), -1), flat, eps).reshape(x.shape)


@sabotage("L1/add_rms_norm")
class SumDropped(NumpyOps):
    """add_rms_norm gives the residual back as it came."""

    def add_rms_norm(self, x: Arr, residual: Arr, w: Packed, eps: float) -> Any:
        return super().add_rms_norm(x, residual, w, eps)[0], residual


@sabotage("L1/gated")
class GateSwapped(NumpyOps):
    """The activation is on the second half."""

    def gated(self, x: Arr, kind: Any) -> Arr:
        return super().gated(np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1), kind)


@sabotage("L1/gated")
class GeluForSilu(NumpyOps):
    """The activation is x * sigmoid(1.702 x)."""

    def gated(self, x: Arr, kind: Any) -> Any:
        gate, up = np.split(x.astype(np.float32), 2, axis=-1)
        with np.errstate(over="ignore"):
            return (gate / (1 + np.exp(-1.702 * gate)) * up).astype(x.dtype)


@sabotage("L1/gated/gelu_tanh")
class GeluTaken(NumpyOps):
    """A gate of any kind is SiLU's."""

    def gated(self, x: Arr, kind: Any) -> Any:
        return super().gated(x, "silu")


@sabotage("L1/gated/gelu_tanh/offset", "L1/gated/gelu_tanh")
class GeluBySigmoid(NumpyOps):
    """GELU is taken as x * sigmoid(1.702 x)."""

    def gated(self, x: Arr, kind: Any) -> Any:
        if kind == "silu":
            return super().gated(x, kind)
        gate, up = np.split(x.astype(np.float32), 2, axis=-1)
        with np.errstate(over="ignore"):
            return (gate / (1 + np.exp(-1.702 * gate)) * up).astype(x.dtype)


@sabotage("L1/logits/softcap")
class LogitsUncapped(NumpyOps):
    """Logits are not capped."""

    def logits(self, x: Arr, w: Packed, softcap: float | None = None) -> Arr:
        return super().logits(x, w)


@sabotage("L1/linear_gated")
class GateInterleaved(NumpyOps):
    """The fused gate takes its weights' rows as gate and up in turn."""

    def linear_gated(self, x: Arr, w: Packed, kind: Any) -> Arr:
        rows = self.linear(x, w)
        return self.gated(np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1), kind)


@sabotage("L1/last")
class LastOffByOne(NumpyOps):
    """The row before the last is taken."""

    def last(self, x: Arr, m: NumpyMeta) -> Arr:
        return x[np.maximum(m.batch.last - 1, 0)]


@sabotage("L1/logits")
class LogitsNarrow(NumpyOps):
    """Logits are rounded to bfloat16."""

    def logits(self, x: Arr, w: Packed, softcap: float | None = None) -> Arr:
        return super().logits(x, w, softcap).astype(HOST_DTYPES["bfloat16"]).astype(np.float32)


@sabotage("L1/linear/normal/float32")
class ProductNarrow(NumpyOps):
    """Products take float32 with 10 bits after the point, as some matrix units do unasked."""

    def _product(self, x: Arr, w: Packed) -> Arr:
        bits = x.astype(np.float32).view(np.uint32) + np.uint32(0x1000)
        return super()._product((bits & np.uint32(0xFFFFE000)).view(np.float32), w)


@sabotage("L2/meta/split", "L1/meta")
class ProductVariant(NumpyOps):
    """Batch invariance is claimed, and a product of one row sums in another order than one of several."""

    def _product(self, x: Arr, w: Packed) -> Arr:
        if len(x) > 1:
            return super()._product(x, w)
        return super()._product(x[:, ::-1], replace(w, value=np.ascontiguousarray(w.value[:, ::-1])))
