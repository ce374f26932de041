"""What every verb must compute, in plain NumPy. Imports no backend.

Each function runs at a Precision: EXACT is float64 without rounding, the truth; `emulated(dtype)` are float32 with
sequential sums, rounded wherever the contract's expansion rounds, which show how far an honest implementation may be
from the truth. Values are float64 arrays that hold numbers of the tested dtype.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Arr: TypeAlias = np.ndarray[Any, np.dtype[Any]]

HOST: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # largest relative error of one rounding


def rounded(x: Any, dtype: str) -> Arr:
    """x with every value rounded to `dtype`, as float64."""
    out: Arr = np.asarray(x).astype(HOST[dtype]).astype(np.float64)
    return out


@dataclass(frozen=True)
class Precision:
    wide: Any
    round: Callable[[Arr], Arr]
    order: int = 1  # -1 sums from the end, 0 in any order

    def take(self, *arrays: Any) -> tuple[Arr, ...]:
        return tuple(np.asarray(a).astype(self.wide) for a in arrays)

    def total(self, terms: Arr) -> Arr:
        """Sum over the last axis, one term after the other."""
        if not self.order:
            return np.asarray(terms.sum(axis=-1))
        out: Arr = np.cumsum(terms[..., :: self.order], axis=-1, dtype=self.wide)[..., -1]
        return out

    def product(self, x: Arr, w: Arr) -> Arr:
        """x [...,N,I] and w [...,O,I] -> [...,N,O], unrounded: each number is the total of I products."""
        if not self.order:
            return x @ w.swapaxes(-1, -2)
        columns = (np.ascontiguousarray(np.moveaxis(a, -1, 0)[:: self.order]) for a in (x, w))
        terms = (a[..., :, None] * b[..., None, :] for a, b in zip(*columns, strict=True))
        return reduce(operator.iadd, terms)


EXACT = Precision(np.float64, lambda x: x, 0)


def emulated(dtype: str) -> tuple[Precision, ...]:
    """Two honest implementations, which sum from the start and from the end."""
    return tuple(Precision(np.float32, lambda x: rounded(x, dtype), order) for order in (1, -1))


def linear(p: Precision, x: Arr, w: Arr, bias: Arr | None = None, final: bool = False) -> Arr:
    """x [T,I], w [O,I]; `final` keeps float32, as logits do."""
    out = p.product(*p.take(x, w))
    if bias is not None:
        out = out + bias.astype(p.wide)
    return out if final else p.round(out)


def rms_norm(p: Precision, x: Arr, w: Arr, eps: float) -> Arr:
    x, w = p.take(x, w)
    mean = p.total(x * x) / p.wide(x.shape[-1])
    return p.round(x / np.sqrt(mean + p.wide(eps))[..., None] * w)


def add(p: Precision, x: Arr, y: Arr) -> Arr:
    x, y = p.take(x, y)
    return p.round(x + y)


def gated(p: Precision, x: Arr, kind: str = "silu") -> Arr:
    """act(first half) * second half; `kind` is silu or gelu_tanh."""
    (x,) = p.take(x)
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    with np.errstate(over="ignore"):
        if kind == "silu":
            return p.round(gate / (p.wide(1) + np.exp(-gate)) * up)
        inner = p.wide(math.sqrt(2 / math.pi)) * (gate + p.wide(0.044715) * gate * gate * gate)
        return p.round(gate / p.wide(2) * (p.wide(1) + np.tanh(inner)) * up)


def capped(p: Precision, x: Arr, cap: float | None) -> Arr:
    return x if cap is None else p.wide(cap) * np.tanh(x / p.wide(cap))


def rope(p: Precision, x: Arr, table: Arr, positions: Arr) -> Arr:
    """x [T,heads,D]; table [positions,D], cos then sin. Dimension i turns with dimension i + D/2."""
    x, turns = p.take(x, table[positions, None])
    (a, b), (cos, sin) = np.split(x, 2, axis=-1), np.split(turns, 2, axis=-1)
    return p.round(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))


@dataclass(frozen=True)
class Attention:
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] = ()  # one for each query head, or none


def attend(p: Precision, q: Arr, k: Arr, v: Arr, a: Attention) -> Arr:
    """Causal attention of one sequence: k and v [L,Hk,D], row t at position t, and q [T,Hq,D], the last T of L. Query
    head h reads key head h // (Hq / Hk)."""
    length, group = len(k), q.shape[1] // k.shape[1]
    q, k, v = (x.swapaxes(0, 1) for x in p.take(q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)))
    ago = np.arange(length - q.shape[1], length)[:, None] - np.arange(length)
    score = capped(p, p.product(q, k) * p.wide(a.scale), a.softcap)
    sink = np.array(a.sinks or (-np.inf,), p.wide)[:, None]
    return p.round(softmax_mean(p, score, (ago >= 0) & (ago < (a.window or length)), v, sink).swapaxes(0, 1))


def softmax_mean(p: Precision, score: Arr, seen: Arr, values: Arr, sink: Any = -np.inf) -> Arr:
    """Means of values [...,L,D] by exp(score [...,T,L]) where `seen` [T,L]; `sink` has a weight and no value."""
    score = np.where(seen, score, p.wide(-np.inf))
    top = np.maximum(score.max(axis=-1), sink)
    e = np.exp(score - top[..., None])
    weights = p.round(e).astype(p.wide)  # kernels may round the weights to the dtype
    out: Arr = p.product(weights, values.swapaxes(-1, -2)) / (p.total(e) + np.exp(sink - top))[..., None]
    return out


def logprobs(p: Precision, x: Arr) -> Arr:
    """log softmax over the last axis."""
    (x,) = p.take(x)
    x = x - x.max(axis=-1, keepdims=True)
    out: Arr = x - np.log(p.total(np.exp(x)))[..., None]
    return out


@dataclass(frozen=True)
class SampleRow:
    """How to sample one row; `allowed` are the ids a mask permits, None permits all. `adjust` has (id, factor, add)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int
    allowed: tuple[int, ...] | None = None
    adjust: tuple[tuple[int, float, float], ...] = ()


def sample(x: Arr, r: SampleRow) -> set[int]:
    """The tokens that the definition allows for logits x [V]: one, or the few that differ by rounding alone."""
    x = x.copy()
    for i, factor, add in r.adjust:
        scaled = np.float32(x[i] / factor if x[i] > 0 else x[i] * factor)
        x[i] = np.float32(float(scaled) + add)
    ids = range(len(x)) if r.allowed is None else r.allowed
    if r.temperature == 0:
        best = max(float(x[i]) for i in ids)
        return {next(i for i in ids if float(x[i]) == best)}
    ranked = sorted(((float(x[i]) / r.temperature, i) for i in ids), key=lambda zi: (-zi[0], zi[1]))
    ranked = ranked[: r.top_k] if r.top_k > 0 else ranked
    weights = [math.exp(z - ranked[0][0]) for z, _ in ranked]
    p = [w / sum(weights) for w in weights]
    out: set[int] = set()
    for slack in (-1e-5, 0.0, 1e-5):  # a token on the very edge of top_p or min_p may stay or go
        stays = [
            zi
            for n, zi in enumerate(ranked)
            if n == 0
            or ((r.top_p == 1 or sum(p[:n]) < r.top_p + slack) and (r.min_p == 0 or p[n] >= (r.min_p - slack) * p[0]))
        ]
        scores = [(z + gumbel(r.seed, r.position, i), i) for z, i in stays]
        out |= {i for score, i in scores if score >= max(scores)[0] - 1e-5}
    return out


def gumbel(seed: int, position: int, token: int) -> float:
    h = _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (position & 0xFFFFFFFF)) ^ token)
    u = float(np.float32(((h >> 9) + 0.5) * 2.0**-23))
    return -math.log(-math.log(u))


def _mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16
