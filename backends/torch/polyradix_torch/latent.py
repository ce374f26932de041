"""The two forms of latent attention in plain torch, in float32 inside. `up` is [H, nope+v, R] float32.

Absorbed, every query head meets the latent rows themselves, and a token's bits do not depend on its batch: products per
head are taken in blocks of ROWS rows, padded with zeros, so in one shape. Expanded, keys and values are made of every
row of the sequence first, which is fewer multiplications once enough queries share them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from polyradix.backend.protocol import LatentSpec

ROWS = 8  # a decode of one sequence computes so many rows for one; a prefill reads `up` once for so many


def expanding_pays(queries: int, length: int, a: LatentSpec) -> bool:
    """Whether it takes fewer multiplications per head for the newest `queries` tokens of a sequence of `length`."""
    pairs, made = queries * (length - queries / 2), a.rank * (a.nope + a.v)
    return length * made + pairs * (a.nope + a.rope + a.v) < queries * made + pairs * (2 * a.rank + a.rope)


def per_head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [n,H,a] times w [H,a,b]: [n,H,b]."""
    blocks = F.pad(x, (0, 0, 0, 0, 0, -len(x) % ROWS)).unflatten(0, (-1, ROWS)).transpose(1, 2)
    out = torch.stack([torch.bmm(block, w) for block in blocks])
    return out.transpose(1, 2).flatten(0, 1)[: len(x)]


def absorb(q: torch.Tensor, up: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """Queries [n,H,nope+rope] float32 -> [n,H,R+rope], to meet latent rows as they are."""
    return torch.cat([per_head(q[..., : a.nope], up[:, : a.nope]), q[..., a.nope :]], dim=-1)


def unabsorb(mean: torch.Tensor, up: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """Weighted means of latent rows [n,H,R] -> [n,H,v]."""
    return per_head(mean, up[:, a.nope :].transpose(1, 2))


def expanded(q: torch.Tensor, rows: torch.Tensor, up: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """The newest n tokens of one sequence: q [n,H,nope+rope], rows [L,R+rope], float32 -> [n,H,v]."""
    made = torch.matmul(rows[:, : a.rank], up.transpose(1, 2))  # [H,L,nope+v]
    key = torch.cat([made[..., : a.nope], rows[:, a.rank :].expand(len(up), -1, -1)], dim=-1)
    seen = torch.ones(len(q), len(rows), dtype=torch.bool, device=q.device).tril(len(rows) - len(q))
    out = F.scaled_dot_product_attention(q.transpose(0, 1), key, made[..., a.nope :], seen, scale=a.scale)
    return out.transpose(0, 1)
