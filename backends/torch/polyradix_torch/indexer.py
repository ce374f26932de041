"""The indexer of `attend_sparse` in plain torch. What a token sees, and makes of it, depends on no other token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from polyradix.backend.protocol import Index, IndexSpec, LatentSpec

Rope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]


class Indexed(NamedTuple):
    """A layer's KV: latent rows [pages,page_size,1,R+rope], and apart from them the indexer's keys [..,dim]."""

    rows: torch.Tensor
    keys: torch.Tensor


def turned(
    rope: Rope, x: Index, table: torch.Tensor, m: Any, columns: int, s: IndexSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T,heads,dim] and keys [T,dim], normed, with their first `columns` rotated by Ops.rope."""
    key, q = layer_norm(x.k, x.norm, s.eps), x.q.view(len(x.q), s.heads, s.dim)
    first, first_key = rope(q[..., :columns].contiguous(), key[:, None, :columns].contiguous(), table, m)
    return torch.cat([first, q[..., columns:]], dim=2), torch.cat([first_key[:, 0], key[:, columns:]], dim=1)


def layer_norm(x: torch.Tensor, w: tuple[torch.Tensor, torch.Tensor], eps: float) -> torch.Tensor:
    """Over the last axis, in float32, in the dtype of x."""
    off = x.float() - x.float().mean(-1, keepdim=True)
    root = (off.square().mean(-1, keepdim=True) + eps).sqrt()  # a GPU's rsqrt is not exact
    return (off / root * w[0] + w[1]).to(x.dtype)


def select(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, top_k: int) -> torch.Tensor:
    """q [heads,dim] with weights [heads] over keys [L,dim]: the positions that are seen, ascending. topk promises no
    order of equal scores."""
    score = weights @ (q.float() @ keys.T).relu()
    return score.sort(descending=True, stable=True).indices[:top_k].sort().values


def attend_alone(q: torch.Tensor, rows: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """An absorbed query [H,R+rope] over rows [k,R+rope] -> their weighted means [H,R]."""
    return (q @ rows.T * a.scale).softmax(-1) @ rows[:, : a.rank]
