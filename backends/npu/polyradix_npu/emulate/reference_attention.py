"""What npu_fused_infer_attention_score_v2 computes, sequence by sequence, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import torch

Args = SimpleNamespace


def attention(c: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, in the layout of the query, and the log of sums, empty if it is not asked for."""
    if c.input_layout == "BSH":
        split = {"input_layout": "BSND", "query": c.query.unflatten(-1, (c.num_query_heads, -1))}
        out, logs = attention(Args(**{**vars(c), **split}))
        return out.flatten(2), logs
    heads = c.num_key_value_heads or c.num_query_heads
    out, logs = room(c)
    for i, (where, length) in enumerate(_sequences(c)):
        q, k, v = c.query[where].float(), _rows(c, c.key, i, heads), _rows(c, c.value, i, heads)
        if c.query_rope is not None:
            q = torch.cat([q, c.query_rope[where].float()], dim=-1)
            k = torch.cat([k, _rows(c, c.key_rope, i, heads)], dim=-1)
        hidden = _hidden(c, i, len(q), length)
        made, log_sum = _attend(q, k[:length], v[:length], hidden, c.softmax_scale, c.learnable_sink)
        out[where] = made.to(out.dtype)
        if c.return_softmax_lse:
            logs[where] = log_sum.t()[..., None] if c.input_layout == "TND" else log_sum[..., None]
    return out, logs


def paged_attention(c: Args) -> None:
    """ATB's, whose result goes to `out`."""
    given = {
        "query": c.query[:, None], "key": c.key_cache.flatten(2), "value": c.value_cache.flatten(2),
        "num_query_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "softmax_scale": c.scale_value,
        "block_table": c.block_table, "block_size": c.key_cache.shape[1], "actual_seq_kvlen": c.context_lens.tolist(),
        "input_layout": "BSND", "sparse_mode": 0, "return_softmax_lse": False,
        "atten_mask": None, "learnable_sink": None, "query_rope": None, "key_rope": None,
    }  # fmt: skip
    if c.write:
        c.out.copy_(attention(Args(**given))[0][:, 0])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n,Hq,D], k [L,Hk,D], v [L,Hk,Dv], of which `hidden` [n,L] is not seen -> [n,Hq,Dv], and the log [Hq,n] of
    the sum of exp(score), that of the `sink` [Hq] included."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (torch.einsum("nhd,lhd->hnl", q, k) * scale).masked_fill(hidden, -float("inf"))
    log_sum = scores.logsumexp(-1)
    if sink is not None:
        log_sum = torch.logaddexp(log_sum, sink.float()[:, None])
    return torch.einsum("hnl,lhd->nhd", (scores - log_sum[..., None]).exp(), v), log_sum


def room(c: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs not written yet."""
    heads = (c.num_key_value_heads or c.num_query_heads) if c.block_table is not None else 1
    q = c.query.unflatten(-1, (c.num_query_heads, -1)) if c.input_layout == "BSH" else c.query
    out = q.new_empty(*q.shape[:-1], c.value.shape[-1] // heads)
    rows, count = q.shape[:-2], q.shape[-2]
    sums = (*rows, count, 1) if c.input_layout == "TND" else (rows[0], count, *rows[1:], 1)
    return out.view(*rows, -1) if c.input_layout == "BSH" else out, torch.empty(sums if c.return_softmax_lse else 0)


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
