"""The contract's verbs in plain torch, for any device torch runs on.

A token's bits do not depend on its batch as long as `Linear` keeps that promise for its rows: everything else here is
computed per row, or in shapes that depend on nothing but a token's position. Two places need care for it:

* Attention works on tiles of TILE positions, aligned at multiples of TILE in the sequence, wherever the chunk began.
  Rows of a tile that the batch lacks are zeros. So a given position always meets the same shapes of q, k and v.
* `gated` takes rows in groups below the size at which torch splits an elementwise call over threads, because a split
  in mid-row moves elements between the vector and the scalar form of exp, and those round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import pi
from typing import Any, get_args

import torch
import torch.nn.functional as F

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import (
    FLOAT8_MAX,
    AttnSpec,
    Gate,
    Heads,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    MoeSpec,
    MoeWeights,
)
from polyradix_torch.host import movable
from polyradix_torch.indexer import Indexed, attend_alone, select, turned
from polyradix_torch.latent import absorb, expanded, expanding_pays, unabsorb
from polyradix_torch.moe import SERIAL, clamped, route, share, sigmoid, spread, weighted

GATES = get_args(Gate)
GELU = 2 * (2 / pi) ** 0.5  # its tanh form is x * sigmoid(GELU * (x + 0.044715 x^3))
TILE = 4  # decode computes TILE rows for one, prefill makes one call per TILE tokens: measured as the best balance


class Linear:
    """[T,in] -> [T,out] in the dtype of the weight, bias included."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass
class TorchMeta:
    """One batch on the device. Index tensors are int64, as torch wants them."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    last: torch.Tensor  # [S]
    pages: torch.Tensor  # [S,P]
    rows: list[int]  # [S+1] cu_q
    kv_len: list[int]  # [S]
    rope: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # cos, sin [T,1,D/2] by table
    others: tuple[TorchMeta, ...] = ()  # the same batch as the groups after the first see it

    def grouped(self, others: list[tuple[torch.Tensor, torch.Tensor]]) -> TorchMeta:
        """With the slots and pages of the groups after the first."""
        return replace(self, others=tuple(replace(self, slots=slots, pages=pages) for slots, pages in others))

    def of(self, kv: Any) -> TorchMeta:
        """As the layer with this KV sees the batch."""
        return self.others[kv.group - 1] if self.others and kv.group else self


Attend = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor], TorchMeta, AttnSpec], torch.Tensor]


class Products(Expansions):
    """The verbs that are torch's on any device, whatever a batch looks like there."""

    def linear(self, x: torch.Tensor, w: Linear) -> torch.Tensor:
        return w(x).to(x.dtype)

    def linear_reduce(self, x: torch.Tensor, w: Linear) -> torch.Tensor:
        return self.linear(x, w)

    def qkv(self, x: torch.Tensor, w: Linear, heads: Heads) -> tuple[torch.Tensor, ...]:
        parts = self.linear(x, w).view(len(x), heads.q + 2 * heads.kv, heads.dim)
        return tuple(parts.split([heads.q, heads.kv, heads.kv], dim=1))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y).to(x.dtype)


class TorchOps(Products):
    """Ops. A layer's KV is a LayerKV of two tensors [pages, page_size, kv_heads, head_dim], changed in place, or of
    one, or Indexed.

    `read` replaces how attention reads the cache: (q [T,Hq,D], layer's KV, meta, spec) -> [T,Hq*D]. Unless `invariant`,
    latent attention takes the form with fewer multiplications, and a token's bits depend on its batch.
    """

    def __init__(self, read: Attend | None = None, invariant: bool = True) -> None:
        self._read, self._invariant = read or attend_tiles, invariant

    def embed(self, w: torch.Tensor, m: TorchMeta) -> torch.Tensor:
        return w[m.tokens]

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * w).to(x.dtype)

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, m: TorchMeta
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if id(table) not in m.rope:
            cos, sin = table[m.positions].unsqueeze(1).chunk(2, dim=-1)
            m.rope[id(table)] = cos, sin
        cos, sin = m.rope[id(table)]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, m: TorchMeta, a: AttnSpec) -> Any:
        m = m.of(kv)
        for cache, new in zip(kv, (k, v), strict=True):
            slots = movable(cache).view(-1, *cache.shape[2:])
            slots.index_copy_(0, m.slots, movable(_held(new, cache.dtype)))
        return self._read(q, kv, m, a), kv

    def attend_latent(
        self, q: torch.Tensor, c: torch.Tensor, kv: Any, m: TorchMeta, w: LatentWeights, a: LatentSpec
    ) -> Any:
        asked = self._write_rows(q, c, kv[0], m, w, a)
        return self._latent(asked, kv[0], m, w.up, a).to(q.dtype).flatten(1), kv

    def attend_sparse(
        self,
        q: torch.Tensor,
        c: torch.Tensor,
        x: Index,
        kv: Indexed,
        m: TorchMeta,
        w: LatentWeights,
        a: LatentSpec,
        s: IndexSpec,
    ) -> Any:
        """One token after the other: what one sees is no other's."""
        index, key = turned(self.rope, x, w.table, m, a.rope, s)
        kv.keys.view(-1, s.dim).index_copy_(0, m.slots, key)
        asked = absorb(self._write_rows(q, c, kv.rows, m, w, a), w.up, a)
        mean, weights = asked.new_empty(*asked.shape[:2], a.rank), x.weights.float()
        for seq, length in enumerate(m.kv_len):
            pages = m.pages[seq, : -(-length // kv.rows.shape[1])]
            held, keys = (_gather(cache, pages, length)[0] for cache in kv)
            for t in range(m.rows[seq], m.rows[seq + 1]):
                stop = length - m.rows[seq + 1] + t + 1
                seen = held[select(index[t], weights[t], keys[:stop], s.top_k)]
                mean[t] = attend_alone(asked[t], seen, a)
        return unabsorb(mean, w.up, a).to(q.dtype).flatten(1), kv

    def _write_rows(
        self, q: torch.Tensor, c: torch.Tensor, cache: torch.Tensor, m: TorchMeta, w: LatentWeights, a: LatentSpec
    ) -> torch.Tensor:
        """Returns the queries [T,H,nope+rope], rotated, float32."""
        nope, last = q.view(len(q), -1, a.nope + a.rope).split([a.nope, a.rope], dim=-1)
        last, key = self.rope(last, c[:, None, a.rank :], w.table, m)
        rows = torch.cat([self.rms_norm(c[:, : a.rank], w.norm, a.eps), key[:, 0]], dim=1)
        cache.view(-1, cache.shape[-1]).index_copy_(0, m.slots, rows)
        asked = torch.cat([nope, last], dim=-1).float()
        if a.attn_scale:
            asked *= (1 + a.attn_scale * (1 + m.positions // a.floor_scale).float().log())[:, None, None]
        return asked

    def _latent(
        self, q: torch.Tensor, cache: torch.Tensor, m: TorchMeta, up: torch.Tensor, a: LatentSpec
    ) -> torch.Tensor:
        """q [T,H,nope+rope] float32 -> [T,H,v]."""
        alone = AttnSpec(Heads(len(up), 1, a.rank + a.rope), a.scale)
        absorbed, out = absorb(q, up, a), q.new_empty(len(q), len(up), a.v)
        for s, length in enumerate(m.kv_len):
            held = _gather(cache, m.pages[s, : -(-length // cache.shape[1])], length)
            rows = slice(m.rows[s], m.rows[s + 1])
            if not self._invariant and expanding_pays(rows.stop - rows.start, length, a):
                out[rows] = expanded(q[rows], held[0, :length], up, a)
            else:
                mean = _sequence(absorbed[rows], held, held[..., : a.rank], length, alone)
                out[rows] = unabsorb(mean, up, a)
        return out

    def gated(self, x: torch.Tensor, kind: Gate) -> torch.Tensor:
        if kind not in GATES:
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(GATES)}")
        width = x.shape[-1] // 2
        return torch.cat([_gated(rows, width, kind) for rows in x.split(max(1, SERIAL // width))])

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> torch.Tensor:
        w, first = share(w)
        ids, weights = route(w.router.logits(x), w.router.bias, s)

        def run(e: int, rows: torch.Tensor) -> torch.Tensor:
            gate_up, down = w.gate_up[e], w.down[e]
            inner = (
                self.linear_gated(rows, gate_up, "silu") if s.limit is None else clamped(self.linear(rows, gate_up), s)
            )
            out: torch.Tensor = down(inner)
            return out

        total = weighted(spread(x, ids - (first or 0), len(w.down), run), weights)
        return total.to(x.dtype) if first is None else total

    def last(self, x: torch.Tensor, m: TorchMeta) -> torch.Tensor:
        return x[m.last]

    def logits(self, x: torch.Tensor, w: Linear, softcap: float | None = None) -> torch.Tensor:
        out = w(x).float()
        if softcap is not None:
            for row in out:  # each by itself, so that all meet the same vectors and threads
                row.div_(softcap).tanh_().mul_(softcap)
        return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _gated(x: torch.Tensor, width: int, kind: Gate) -> torch.Tensor:
    gate, up = x.float().clone().split(width, dim=-1)
    if kind == "silu":
        F.silu(gate, inplace=True)
    else:
        gate.mul_(sigmoid(gate * (GELU + GELU * 0.044715 * gate.square())))
    return gate.mul_(up).to(x.dtype, memory_format=torch.contiguous_format)


def attend_tiles(q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], m: TorchMeta, a: AttnSpec) -> torch.Tensor:
    """Attention of all sequences over the paged cache: q [T,Hq,D] -> [T,Hq*D], in float32 inside."""
    page_size = kv[0].shape[1]
    out = torch.empty_like(q)
    for s, length in enumerate(m.kv_len):
        pages = m.pages[s, : -(-length // page_size)]
        rows = slice(m.rows[s], m.rows[s + 1])
        seen = 0 if a.window is None else max(0, length - (rows.stop - rows.start) + 1 - a.window)
        k, v = (_gather(cache, pages, length, seen) for cache in kv)
        out[rows] = _sequence(q[rows], k, v, length, a)
    return out.flatten(1)


def _held(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a cache of this dtype holds it."""
    return x.float().clamp(-FLOAT8_MAX, FLOAT8_MAX).to(dtype) if dtype == torch.float8_e4m3fn else x


def _gather(cache: torch.Tensor, pages: torch.Tensor, length: int, begin: int = 0) -> torch.Tensor:
    """[kv_heads, tokens rounded up to whole tiles, D] float32; zeros before `begin` and from `length` on, where a page
    holds anything."""
    tokens = cache[pages].flatten(0, 1)
    if tokens.dtype == torch.float8_e4m3fn:
        tokens = tokens.float()
    whole = -(-length // TILE) * TILE
    if whole > len(tokens):
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, whole - len(tokens)))
    tokens[length:whole] = 0
    if begin:
        tokens[:begin] = 0
    return tokens[:whole].transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)


def _sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, a: AttnSpec) -> torch.Tensor:
    """The newest len(q) tokens of one sequence of `length`: q [n,Hq,D], k [Hkv,L,D], v [Hkv,L,Dv] -> [n,Hq,Dv]."""
    n, group, dim = len(q), a.heads.q // a.heads.kv, a.heads.dim
    start = length - n
    first, ahead = start // TILE, start % TILE
    tiles = -(-length // TILE) - first
    padded = q.new_zeros(tiles * TILE, *q.shape[1:], dtype=torch.float32)
    padded[ahead : ahead + n] = q
    folded = padded.view(tiles, TILE, a.heads.kv, group, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(tiles, a.heads.kv, group * TILE, dim)
    parts = [_tile(folded[i], k, v, (first + i) * TILE, a) for i in range(tiles)]
    out = torch.stack(parts).view(tiles, a.heads.kv, group, TILE, v.shape[2]).permute(0, 3, 1, 2, 4)
    return out.reshape(tiles * TILE, a.heads.q, v.shape[2])[ahead : ahead + n]


def _tile(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, a: AttnSpec) -> torch.Tensor:
    """Positions start..start+TILE: q [Hkv, group*TILE, D] -> [Hkv, group*TILE, Dv]. Reads keys up to its own end."""
    stop = start + TILE
    begin = 0 if a.window is None else max(0, start - a.window + 1)
    scores = torch.bmm(q, k[:, begin:stop].transpose(1, 2)).mul_(a.scale)
    if a.softcap is not None:
        scores.div_(a.softcap).tanh_().mul_(a.softcap)
    hidden = torch.ones(TILE, stop - begin, dtype=torch.bool, device=q.device)
    future = hidden.triu(start - begin + 1)
    if a.window is not None:
        future |= hidden.tril(start - begin - a.window)
    scores.view(len(q), -1, TILE, stop - begin).masked_fill_(future, float("-inf"))
    if a.sinks is None:
        return torch.bmm(scores.softmax(-1), v[:, begin:stop])
    sinks = a.sinks.view(len(q), -1, 1, 1).expand(-1, -1, TILE, 1).reshape(len(q), -1, 1)
    return torch.bmm(torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1], v[:, begin:stop])
