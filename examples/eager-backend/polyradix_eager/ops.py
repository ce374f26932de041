"""The verbs: T tokens in S sequences, H hidden size, D head size, F feed-forward width, V vocabulary.

No verb changes its arguments, the cache apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import AttnSpec, Gate, Heads
from torch import Tensor


class Packed(NamedTuple):
    """One parameter."""

    value: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Batch:
    """The Meta of this backend: a HostBatch on the device, indices as int64."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    pages: Tensor  # [S,P]
    last: Tensor  # [S]
    cu_q: list[int]  # [S+1]
    kv_len: list[int]  # [S]


LayerKV = tuple[Tensor, Tensor]  # k and v, each [pages, page_size, kv_heads, D]


class EagerOps(Expansions):
    """Expansions has `layers`, `add_rms_norm` and `linear_gated`."""

    def embed(self, w: Packed, m: Batch) -> Tensor:
        """[T,H]."""
        return w.value[m.tokens]

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """[T,I] -> [T,O/tp], bias included if the spec has one."""
        return F.linear(x, w.value, w.bias)

    def linear_reduce(self, x: Tensor, w: Packed) -> Tensor:
        """[T,I/tp] -> [T,O], summed over tp, then bias."""
        return F.linear(x, w.value, w.bias)  # of one rank, which is the sum

    def qkv(self, x: Tensor, w: Packed, heads: Heads) -> tuple[Tensor, ...]:
        """[T,Hq/tp,D], 2 x [T,Hk/tp,D]."""
        rows = self.linear(x, w).view(len(x), heads.q + 2 * heads.kv, heads.dim)
        return rows.split([heads.q, heads.kv, heads.kv], dim=1)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise, rounded to the dtype of x."""
        return (x + y).to(x.dtype)

    def rms_norm(self, x: Tensor, w: Packed, eps: float) -> Tensor:
        """Over the last axis: [T,H], or [T,heads,D]."""
        f = x.float()
        return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * w.value.float()).to(x.dtype)

    def rope(self, q: Tensor, k: Tensor, table: Packed, m: Batch) -> tuple[Tensor, Tensor]:
        """Half-split (NeoX) pairs."""
        cos, sin = table.value[m.positions].unsqueeze(1).chunk(2, dim=-1)  # [T,1,D/2] each
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, m: Batch, a: AttnSpec) -> tuple[Tensor, LayerKV]:
        """[T,Hq/tp*D]. Writes k and v first, then reads the pages of each sequence."""
        if a.sinks is not None:
            raise Unsupported("sinks")
        page_size = kv[0].shape[1]
        for cache, new in zip(kv, (k, v), strict=True):
            cache[m.slots // page_size, m.slots % page_size] = new
        out = torch.empty_like(q)
        for s, length in enumerate(m.kv_len):
            pages = m.pages[s, : -(-length // page_size)]
            keys, values = (cache[pages].flatten(0, 1)[:length] for cache in kv)  # what lies beyond is anything
            rows = slice(m.cu_q[s], m.cu_q[s + 1])
            out[rows] = attend_one(q[rows], keys, values, m.positions[rows], a)
        return out.flatten(1), kv

    def gated(self, x: Tensor, kind: Gate) -> Tensor:
        """[T,2F] -> [T,F]: act(first half) * second half."""
        if kind != "silu":
            raise Unsupported("gelu_tanh", f"kind is {kind!r}; expected 'silu'")
        gate, up = x.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)

    def last(self, x: Tensor, m: Batch) -> Tensor:
        """[T,H] -> [S,H], the rows HostBatch.last names."""
        return x[m.last]

    def logits(self, x: Tensor, w: Packed, softcap: float | None = None) -> Tensor:
        """[S,H] -> [S,V] float32, gathered over tp. Products of bfloat16 would be rounded, and make ties."""
        out = F.linear(x.float(), w.value.float(), w.bias)
        return out if softcap is None else softcap * torch.tanh(out / softcap)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend_one(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, a: AttnSpec) -> Tensor:
    """The n newest tokens of one sequence of L: q [n,Hq,D], k and v [L,Hk,D], positions [n] -> [n,Hq,D]."""
    group = a.heads.q // a.heads.kv  # query head h reads kv head h // group
    k, v = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [Hq,L,D]
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * a.scale  # [Hq,n,L]
    if a.softcap is not None:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    behind = positions[:, None] - torch.arange(len(k[0]), device=q.device)  # [n,L]: how far key j lies behind query i
    seen = behind >= 0 if a.window is None else (behind >= 0) & (behind < a.window)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)
