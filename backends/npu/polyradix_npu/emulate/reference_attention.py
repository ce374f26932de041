"""What npu_fused_infer_attention_score_v2 computes, sequence by sequence, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import torch

Args = SimpleNamespace


def attention(c: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, in the layout of the query, and an empty log of sums."""
    heads = c.num_key_value_heads or c.num_query_heads
    out, logs = room(c)
    for i, (where, length) in enumerate(_sequences(c)):
        q, k, v = c.query[where].float(), _rows(c, c.key, i, heads), _rows(c, c.value, i, heads)
        if c.query_rope is not None:
            q = torch.cat([q, c.query_rope[where].float()], dim=-1)
            k = torch.cat([k, _rows(c, c.key_rope, i, heads)], dim=-1)
        hidden = _hidden(c, i, len(q), length)
        out[where] = _attend(q, k[:length], v[:length], hidden, c.softmax_scale).to(out.dtype)
    return out, logs


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n,Hq,D], k [L,Hk,D], v [L,Hk,Dv] -> [n,Hq,Dv]; `hidden` [n,L]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -float("inf")).softmax(-1), v)


def room(c: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs not written yet."""
    heads = (c.num_key_value_heads or c.num_query_heads) if c.block_table is not None else 1
    return c.query.new_empty(*c.query.shape[:-1], c.value.shape[-1] // heads), torch.empty(0)


def _sequences(c: Args) -> Iterator[tuple[slice | int, int]]:
    """Where a sequence's rows are in the query, and how many keys it has."""
    if c.input_layout == "TND":
        keys = c.actual_seq_kvlen
        if c.block_table is None:
            keys = [b - a for a, b in pairwise([0, *keys])]
        yield from zip((slice(a, b) for a, b in pairwise([0, *c.actual_seq_qlen])), keys, strict=True)
    else:
        yield from enumerate(c.actual_seq_kvlen)


def _rows(c: Args, x: torch.Tensor, i: int, heads: int) -> torch.Tensor:
    """Rows of sequence i, [L or more, heads, D] float32."""
    if c.block_table is not None:
        blocks = -(-c.actual_seq_kvlen[i] // c.block_size)
        return x[c.block_table[i, :blocks].long()].flatten(0, 1).unflatten(1, (heads, -1)).float()
    if c.input_layout == "TND":
        start, stop = ([0, *c.actual_seq_kvlen])[i : i + 2]
        return x[start:stop].float()
    return x[i].float()


def _hidden(c: Args, i: int, rows: int, length: int) -> torch.Tensor:
    """bool [rows, length]: what sparse_mode hides."""
    nothing = torch.zeros(rows, length, dtype=torch.bool)
    if c.sparse_mode == 0:
        return nothing if c.atten_mask is None else c.atten_mask[i, 0, :, :length].bool()
    distance = torch.arange(length)[None] - torch.arange(length - rows, length)[:, None]  # key less query
    if c.sparse_mode == 3:
        return distance > 0
    return (distance > c.next_tokens) | (distance < -c.pre_tokens)
