"""Latent attention through the vendor's fused op. Its cache is two tensors, [pages, page, 1, 512] of normed latents and
[pages, page, 1, 64] of rotated keys. A batch of single new tokens is absorbed: queries meet latent rows as they are. A
batch with longer ones is expanded: keys and values are made of every row first, as the fused op takes no pages then.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F

from polyradix.backend.protocol import LatentSpec
from polyradix_npu import calls
from polyradix_torch.latent import expanded
from polyradix_torch.ops import TorchMeta

RANK, ROPE = 512, 64
SIZE = 128  # of nope and v, in the expanded form
KV = tuple[torch.Tensor, torch.Tensor]


def absorb(q: torch.Tensor, rope: torch.Tensor, kv: KV, m: TorchMeta, up: torch.Tensor, a: LatentSpec) -> torch.Tensor:
    """One new token a sequence: q [S,H,nope], rope [S,H,64] rotated -> [S,H,v]."""
    heads = 1 << (a.heads - 1).bit_length()  # the op takes powers of two
    met = torch.bmm(q.transpose(0, 1), up[:, : a.nope]).transpose(0, 1)
    met, rope = (F.pad(x, (0, 0, 0, heads - a.heads))[:, None] for x in (met, rope))
    latents, keys = (cache.flatten(2) for cache in kv)
    mean, _ = calls.attend(
        met,
        (latents, latents),
        "BSND",
        heads,
        1,
        a.scale,
        query_rope=rope.contiguous(),
        key_rope=keys,
        block_table=m.pages,
        block_size=kv[0].shape[1],
        actual_seq_kvlen=m.kv_len,
    )
    return torch.bmm(mean[:, 0, : a.heads].transpose(0, 1), up[:, a.nope :].transpose(1, 2)).transpose(0, 1)


def expand(
    q: torch.Tensor, rope: torch.Tensor, kv: KV, m: TorchMeta, up: torch.Tensor, a: LatentSpec, mask: torch.Tensor
) -> torch.Tensor:
    """As `absorb`, of sequences with any number of new tokens, T in all."""
    if (a.nope, a.v) != (SIZE, SIZE):
        return plain(q, rope, kv, m, up, a)
    latents, keys = (torch.cat(_gather(cache, m)) for cache in kv)
    made = F.linear(latents, up.flatten(0, 1)).unflatten(1, (a.heads, -1))
    out, _ = calls.attend(
        q,
        (made[..., :SIZE].contiguous(), made[..., SIZE:].contiguous()),
        "TND",
        a.heads,
        a.heads,
        a.scale,
        query_rope=rope.contiguous(),
        key_rope=keys[:, None].expand(-1, a.heads, -1).contiguous(),
        actual_seq_qlen=m.rows[1:],
        actual_seq_kvlen=list(accumulate(m.kv_len)),
        sparse_mode=calls.CAUSAL,
        atten_mask=mask,
    )
    return out


def plain(
    q: torch.Tensor, rope: torch.Tensor, kv: tuple[torch.Tensor, ...], m: TorchMeta, up: torch.Tensor, a: LatentSpec
) -> torch.Tensor:
    """As `expand`, in torch and in float32, sequence by sequence, of a cache in one tensor or in two."""
    asked = torch.cat([q, rope], dim=-1).float()
    held = [torch.cat(parts, dim=-1).float() for parts in zip(*(_gather(cache, m) for cache in kv), strict=True)]
    spans = [slice(*m.rows[s : s + 2]) for s in range(len(held))]
    out = [expanded(asked[span], rows, up.float(), a) for span, rows in zip(spans, held, strict=True)]
    return torch.cat(out).to(q.dtype)


def _gather(cache: torch.Tensor, m: TorchMeta) -> list[torch.Tensor]:
    """Each sequence's rows, [length, columns]."""
    used = [-(-length // cache.shape[1]) for length in m.kv_len]
    pages = [m.pages[s, :count] for s, count in enumerate(used)]
    return [cache.index_select(0, p).flatten(0, 1)[:n, 0] for p, n in zip(pages, m.kv_len, strict=True)]
