"""What `attend_sparse` does for one token, in plain torch and float32: its bits do not depend on the batch."""

from __future__ import annotations

import torch

from polyradix.backend.protocol import LatentSpec


def layer_norm(x: torch.Tensor, w: tuple[torch.Tensor, torch.Tensor], eps: float) -> torch.Tensor:
    """Over the last axis, in float32, in the dtype of x."""
    off = x.float() - x.float().mean(-1, keepdim=True)
    scale = torch.rsqrt(off.square().mean(-1, keepdim=True) + eps)
    return (off * scale * w[0] + w[1]).to(x.dtype)


def select(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, top_k: int) -> torch.Tensor:
    """q [heads,dim] with weights [heads] over keys [L,dim]: the positions that are seen, ascending. topk promises no
    order of equal scores."""
    score = weights @ (q @ keys.T).relu()
    return score.sort(descending=True, stable=True).indices[:top_k].sort().values


def attend_alone(q: torch.Tensor, rows: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """An absorbed query [H,R+rope] over rows [k,R+rope] -> their weighted means [H,R]."""
    return (q @ rows.T * a.scale).softmax(-1) @ rows[:, : a.rank]
