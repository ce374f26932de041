"""What `moe` must compute, one expert after the other, in plain NumPy. Imports no backend. See oracle.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyradix_conformance import oracle
from polyradix_conformance.oracle import Arr, Precision


@dataclass(frozen=True)
class Routing:
    """The fields of the contract's MoeSpec."""

    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    bias: str = "choice"
    limit: float | None = None
    alpha: float = 1.0


@dataclass(frozen=True)
class Experts:
    """router [E,H], bias [E] or None, gate_up [E,2F,H], down [E,H,F], and their biases [E,2F], [E,H] or None."""

    router: Arr
    bias: Arr | None
    gate_up: Arr
    down: Arr
    gate_up_bias: Arr | None = None
    down_bias: Arr | None = None

    def choice_bias(self, r: Routing) -> Arr | None:
        return self.bias if r.bias == "choice" else None


def moe(p: Precision, x: Arr, w: Experts, r: Routing) -> Arr:
    """[T,H] -> [T,H]. Rounds between the products, and each expert's output, which is as much as a kernel may."""
    score = scores(p, x, w, r)
    ids = np.array([route(row, w.choice_bias(r), r) for row in score])
    weights = np.take_along_axis(score, ids, axis=1)
    if r.renormalise:
        weights = weights / (p.total(weights) + p.wide(1e-20))[:, None]
    weights = weights * p.wide(r.scale)
    parts = np.empty((*ids.shape, w.down.shape[1]), p.wide)
    for e in np.unique(ids):
        rows, places = np.nonzero(ids == e)
        parts[rows, places] = _expert(p, x[rows], w, e, r)
    return p.round(p.total((weights[..., None] * parts).swapaxes(1, 2)))


def scores(p: Precision, x: Arr, w: Experts, r: Routing) -> Arr:
    """[T,E] of tokens x [T,H], never rounded."""
    z = oracle.linear(p, x, w.router, w.bias if r.bias == "logits" else None, final=True)
    with np.errstate(over="ignore"):
        if r.scoring == "sigmoid":
            out: Arr = p.wide(1) / (p.wide(1) + np.exp(-z))
            return out
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        out = e / p.total(e)[:, None]
        return out


def route(score: Arr, bias: Arr | None, r: Routing) -> list[int]:
    """Ids of the chosen experts, best first."""
    choice = [float(v) for v in (score if bias is None else score + bias.astype(score.dtype))]
    size = r.experts // r.groups
    members = [range(g * size, (g + 1) * size) for g in range(r.groups)]
    best = [sum(sorted((choice[e] for e in group), reverse=True)[: r.group_best]) for group in members]
    kept = sorted(range(r.groups), key=lambda g: (-best[g], g))[: r.top_groups]
    return sorted((e for g in kept for e in members[g]), key=lambda e: (-choice[e], e))[: r.top_k]


def margin(score: Arr, bias: Arr | None, r: Routing) -> float:
    """How far the choice of experts and of groups is from another one, as a share of the values that decide it."""
    choice = score if bias is None else score + bias
    grouped = choice.reshape(r.groups, -1)
    best = np.sort(grouped, axis=1)[:, -r.group_best :].sum(axis=1)
    kept = np.sort(np.argsort(-best, kind="stable")[: r.top_groups])
    return min(_gap(best, r.top_groups), _gap(grouped[kept].ravel(), r.top_k))


def _gap(values: Arr, n: int) -> float:
    if n == len(values):
        return np.inf
    last, first = np.sort(values)[::-1][n - 1 : n + 1]
    return float((last - first) / max(abs(last), abs(first)))


def _expert(p: Precision, x: Arr, w: Experts, e: int, r: Routing) -> Arr:
    both = oracle.linear(p, x, w.gate_up[e], None if w.gate_up_bias is None else w.gate_up_bias[e])
    inner = oracle.gated(p, both) if r.limit is None else _clamped(p, both, r.limit, r.alpha)
    return oracle.linear(p, inner, w.down[e], None if w.down_bias is None else w.down_bias[e])


def _clamped(p: Precision, x: Arr, limit: float, alpha: float) -> Arr:
    (x,) = p.take(x)
    gate, up = np.split(x, 2, axis=-1)
    gate, up = np.minimum(gate, p.wide(limit)), np.clip(up, p.wide(-limit), p.wide(limit))
    with np.errstate(over="ignore"):
        return p.round(gate / (p.wide(1) + np.exp(p.wide(-alpha) * gate)) * (up + p.wide(1)))
