"""Mixture of experts in plain torch: tokens sorted by expert, then one product per expert that has any.

A token's bits do not depend on its batch as long as the packed linears keep that promise: scores are taken in groups of
whole vectors (see polyradix_torch.ops), and a token's experts are summed in the order of their choice values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from polyradix.backend.protocol import MoeSpec, MoeWeights, Weight

Rows = Callable[[torch.Tensor], torch.Tensor]
VECTOR = 64  # columns: a whole number of vectors on any processor, so that no element is left to the scalar form of exp
SERIAL = 32768  # torch's own grain size: elementwise calls of up to so many elements stay on one thread


@dataclass(frozen=True)
class Router:
    """Logits [T,H] -> [T,experts] float32, and the bias [experts] float32, which they do not have yet."""

    logits: Rows
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Some:
    """A weight of some experts, those from id `first` on. Of such weights `moe` gives what these experts add to the
    sum, in float32."""

    weight: Weight
    first: int


def share(w: MoeWeights) -> tuple[MoeWeights, int | None]:
    """The weights that there are, and the first one's id if they are of some experts."""
    if not isinstance(w.down, Some):
        return w, None
    return MoeWeights(w.router, w.gate_up.weight, w.down.weight), w.down.first


def route(logits: torch.Tensor, bias: torch.Tensor | None, s: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [T,top_k] of the chosen experts, best first, and their weights float32, from logits [T,experts]."""
    if s.bias == "logits" and bias is not None:
        logits, bias = logits + bias, None
    score = logits.softmax(-1) if s.scoring == "softmax" else sigmoid(logits)
    ids = _chosen(score if bias is None else score + bias, s)
    weights = score.gather(1, ids)
    if s.renormalise:
        total = weights[:, 0]
        for column in weights.unbind(1)[1:]:
            total = total + column
        weights = weights / (total + 1e-20)[:, None]
    return ids, weights * s.scale


def clamped(x: torch.Tensor, s: MoeSpec) -> torch.Tensor:
    """The gate of a MoeSpec with a limit: [n,2F] -> [n,F]."""
    assert s.limit is not None
    gate, up = x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=s.limit), up.clamp(-s.limit, s.limit)
    return (gate * sigmoid(s.alpha * gate) * (up + 1)).to(x.dtype)


def spread(
    x: torch.Tensor, ids: torch.Tensor, experts: int, run: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """run(expert, rows of x [n,H]) -> [n,H] for every expert that has rows; gives float32 [T,top_k,H], which is zero
    where an id is none of 0 to experts - 1."""
    flat = torch.where((ids < 0) | (ids >= experts), experts, ids).flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts).tolist()[:experts]
    mine = order[: sum(counts)]
    rows = (x[mine // ids.shape[1]]).split(counts)
    out = torch.zeros(len(order), x.shape[1], dtype=torch.float32, device=x.device)
    if len(mine):
        out[mine] = torch.cat([run(e, part).float() for e, part in enumerate(rows) if len(part)])
    return out.view(*ids.shape, -1)


def weighted(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over top_k of parts [T,top_k,H] times weights [T,top_k]."""
    total = parts[:, 0] * weights[:, :1]
    for i in range(1, weights.shape[1]):
        total = total + parts[:, i] * weights[:, i : i + 1]
    return total


def _chosen(choice: torch.Tensor, s: MoeSpec) -> torch.Tensor:
    if s.groups > 1:
        grouped = choice.unflatten(1, (s.groups, -1))
        best = grouped.sort(dim=2, descending=True).values[..., : s.group_best].sum(2)
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, _best(best, s.top_groups), False)
        choice = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return _best(choice, s.top_k)


def _best(values: torch.Tensor, n: int) -> torch.Tensor:
    """Columns of the n largest values of each row, of equal ones the first: topk promises no order."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :n]


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    wide = F.pad(x, (0, -x.shape[1] % VECTOR))
    return torch.cat([rows.sigmoid() for rows in wide.split(max(1, SERIAL // wide.shape[1]))])[:, : x.shape[1]]
