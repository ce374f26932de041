"""The documented rules of npu_fused_infer_attention_score_v2, for the layouts BSH, BSND and TND, and of ATB's
_npu_paged_attention (PagedAttentionOperation in CANN's documents)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from polyradix_npu.contracts import HALF, Check, Given

MASK = 2048
TND_SIZES = (128, 192)
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LATENT, ROPE = 512, 64
_seen = WeakIdKeyDictionary()  # masks whose values were looked at


def attention(c: Given) -> None:
    c.need(c.input_layout in ("BSH", "BSND", "TND"), "input_layout", "'BSH', 'BSND' or 'TND'")
    tnd = c.input_layout == "TND"
    c.tensor("query", HALF, (4,) if c.input_layout == "BSND" else (3,))
    if c.input_layout == "BSH":
        c.need(c.query.shape[-1] % c.num_query_heads == 0, "num_query_heads", "a divisor of the last axis of query")
        c.need(c.query_rope is None, "query_rope", "None with BSH: no contract of it is known here")
        c.query = c.query.unflatten(-1, (c.num_query_heads, -1))
    for name in ("key", "value"):
        c.tensor(name, HALF, (3, 4))
        c.alike(name, "query")
    _no_quantisation(c)
    _heads(c)
    batch, longest = (len(c.actual_seq_qlen or ()), 0) if tnd else c.query.shape[:2]
    if tnd:
        longest = _packed(c)
    if c.query_rope is not None or c.key_rope is not None:
        _rope(c, tnd, longest)
    else:
        _head_size(c, tnd, longest)
    if c.block_table is not None:
        _paged(c, batch, longest, tnd)
    elif tnd:
        _unpaged(c, batch)
    _mask(c, tnd, longest)
    if c.learnable_sink is not None:
        _sink(c, tnd)


def _sink(c: Given, tnd: bool) -> None:
    sink = c.tensor("learnable_sink", (torch.bfloat16,), (1,))
    c.need(tnd, "input_layout", "TND with learnable_sink")
    c.need(len(sink) == c.num_query_heads, "learnable_sink", f"{c.num_query_heads} values, one for each query head")
    c.need(c.query_rope is None and c.query.shape[-1] <= 128, "query", "heads of at most 128 with learnable_sink")
    c.need(not c.return_softmax_lse, "return_softmax_lse", "False: whether sinks are in the sum is not documented")


def _no_quantisation(c: Given) -> None:
    for name, value in vars(c).items():
        if ("quant" in name or name.endswith("_dtype") or name == "pse_shift") and value:
            c.need(False, name, "its default: no contract of it is known here")


def _heads(c: Given) -> None:
    heads, kv = c.num_query_heads, c.num_key_value_heads or c.num_query_heads
    c.need(c.query.shape[-2] == heads, "num_query_heads", f"the heads of query, {c.query.shape[-2]}")
    c.need(heads % kv == 0, "num_key_value_heads", f"a divisor of num_query_heads ({heads})")
    c.need(c.query_rope is not None or heads // kv <= 64, "num_key_value_heads", "at most 64 query heads to each")
    c.need(heads <= 256, "num_query_heads", "at most 256")


def _packed(c: Given) -> int:
    """The most query rows of a sequence, from the running sums of TND."""
    sums: list[int] = c.actual_seq_qlen
    c.need(sums and c.actual_seq_kvlen, "actual_seq_qlen", "a list, as actual_seq_kvlen, with layout TND")
    c.need(len(sums) == len(c.actual_seq_kvlen) <= 4096, "actual_seq_kvlen", f"{len(sums)} lengths, at most 4096")
    counts = [b - a for a, b in pairwise([0, *sums])]
    c.need(min(counts) >= 0, "actual_seq_qlen", "running sums, which do not fall")
    c.need(sums[-1] == len(c.query), "actual_seq_qlen", f"{len(c.query)} at its end, the rows of query")
    return max(counts)


def _rope(c: Given, tnd: bool, longest: int) -> None:
    c.need(c.query_rope is not None and c.key_rope is not None, "key_rope", "a tensor if and only if query_rope is")
    for name, of in (("query_rope", "query"), ("key_rope", "key")):
        x, whole = c.tensor(name, HALF, (3, 4)), getattr(c, of)
        c.alike(name, of)
        c.need(x.shape[:-2] == whole.shape[:-2], name, f"the leading axes of {of}, {tuple(whole.shape)}")
        c.need(_width(c, of, x) == ROPE, name, f"{ROPE} columns")
    size = c.query.shape[-1]
    c.need(size in (128, LATENT), "query", f"128 or {LATENT} columns beside rope parts")
    if size == 128:
        c.need(tnd and c.block_table is None, "block_table", "None, and layout TND, with 128 columns and rope parts")
        return
    c.need(c.block_table is not None, "block_table", "a table: latent attention is paged")
    c.need(c.num_key_value_heads == 1, "num_key_value_heads", "1 with latent rows")
    c.need(c.num_query_heads in LATENT_HEADS, "num_query_heads", f"one of {LATENT_HEADS}")
    c.need(longest <= 16, "actual_seq_qlen" if tnd else "query", "at most 16 query rows a sequence", longest)


def _width(c: Given, of: str, x: torch.Tensor) -> int:
    paged = of == "key" and c.block_table is not None and x.dim() == 3
    return int(x.shape[-1] // (c.num_key_value_heads or c.num_query_heads) if paged else x.shape[-1])


def _head_size(c: Given, tnd: bool, longest: int) -> None:
    size = c.query.shape[-1]
    if tnd:
        c.need(size in TND_SIZES, "query", f"heads of {' or '.join(map(str, TND_SIZES))} with layout TND", size)
        c.need(c.query.dtype == torch.bfloat16, "query", "bfloat16 with layout TND")
        return
    c.need(size <= 512, "query", "heads of at most 512", size)
    c.need(longest == 1 or size % 16 == 0, "query", "heads of whole 16s", size)
    c.need(longest == 1 or c.num_query_heads * size < 65535, "query", "heads * size below 65535")


def _paged(c: Given, batch: int, longest: int, tnd: bool) -> None:
    heads = c.num_key_value_heads or c.num_query_heads
    lengths, table = c.actual_seq_kvlen, c.tensor("block_table", (torch.int32,), (2,))
    c.need(lengths is not None, "actual_seq_kvlen", "a list with a block table")
    c.need(len(lengths) == batch, "actual_seq_kvlen", f"{batch} lengths")
    size = c.block_size
    for name in ("key", "value") if c.query_rope is None else ("key", "value", "key_rope"):
        cache = c.tensor(name, HALF, (3,))
        c.need(cache.shape[1] == size, name, f"blocks of block_size ({size})")
        c.need(cache.shape[2] % heads == 0 and cache.shape[2] <= 65535, name, "heads * size columns, at most 65535")
    c.need(c.key.shape == c.value.shape, "value", f"the shape of key, {tuple(c.key.shape)}")
    if c.query_rope is not None:
        c.need(size in (16, 128), "block_size", "16 or 128 for latent attention")
    elif tnd or longest == 1:
        c.need(size % 16 == 0 and 0 < size <= (1024 if tnd else 512), "block_size", "whole 16s, at most 1024 (TND)")
    else:
        c.need(size in (128, 256, 384, 512), "block_size", "whole 128s up to 512 for several query rows")
    c.need(len(table) == batch, "block_table", f"{batch} rows")
    _blocks(c, "actual_seq_kvlen", lengths, size, len(c.key))


def _blocks(c: Given, name: str, lengths: list[int], size: int, blocks: int) -> None:
    table = c.block_table
    room = table.shape[1] * size
    c.need(max(lengths) <= room, name, f"lengths up to {room}, what block_table holds: they are no sums", lengths)
    if c.values:
        held = table.cpu()
        used = torch.arange(table.shape[1])[None] * size < torch.tensor(lengths)[:, None]
        c.need(bool(((held >= 0) & (held < blocks))[used].all()), "block_table", f"blocks from 0 to {blocks - 1}")


def _unpaged(c: Given, batch: int) -> None:
    sums = c.actual_seq_kvlen
    c.need(len(sums) == batch and all(b >= a for a, b in pairwise(sums)), "actual_seq_kvlen", "running sums")
    c.need(sums[-1] == len(c.key), "actual_seq_kvlen", f"{len(c.key)} at its end, the rows of key")
    c.need(c.key.shape[:2] == c.value.shape[:2], "value", f"rows and heads of key, {tuple(c.key.shape[:2])}")


def _mask(c: Given, tnd: bool, longest: int) -> None:
    latent = c.query_rope is not None and c.query.shape[-1] == LATENT
    c.need(c.sparse_mode in (0, 3, 4), "sparse_mode", "0, 3 or 4")
    if latent:
        c.need(c.sparse_mode == (0 if longest == 1 else 3), "sparse_mode", "0 for one query row, 3 for more")
    elif longest == 1 and not tnd:
        c.need(c.sparse_mode == 0, "sparse_mode", "0, as it has no effect on a single query row")
    if c.sparse_mode == 0:
        if tnd or latent:
            c.need(c.atten_mask is None, "atten_mask", "None with sparse_mode 0 and layout TND or latent rows")
        elif c.atten_mask is not None:
            _own_mask(c, longest)
        return
    c.need(c.atten_mask is not None, "atten_mask", f"the fixed mask with sparse_mode {c.sparse_mode}")
    mask = c.tensor("atten_mask", (torch.bool, torch.int8, torch.uint8), (2, 3, 4))
    c.need(mask.shape[-2:] == (MASK, MASK) and mask.numel() == MASK**2, "atten_mask", f"({MASK}, {MASK})")
    _upper(c, mask)
    _counts(c, tnd)


def _own_mask(c: Given, longest: int) -> None:
    mask = c.tensor("atten_mask", (torch.bool, torch.int8, torch.uint8), (4,))
    keys = c.block_table.shape[1] * c.block_size if c.block_table is not None else c.key.shape[1]
    want = (len(c.query), 1, longest, keys)
    c.need(mask.shape == want, "atten_mask", f"shape {want}")


def _upper(c: Given, mask: torch.Tensor) -> None:
    if c.values and mask not in _seen:
        held = mask.cpu().view(MASK, MASK).bool()
        c.need(
            torch.equal(held, torch.ones(MASK, MASK, dtype=torch.bool).triu(1)), "atten_mask", "1 above the diagonal"
        )
        _seen[mask] = True


def _counts(c: Given, tnd: bool) -> None:
    """No sequence has more query rows than keys: rows at its start would see nothing."""
    sums: Any = [0, *c.actual_seq_qlen] if tnd else None
    rows = [b - a for a, b in pairwise(sums)] if tnd else [c.query.shape[1]] * len(c.query)
    keys = c.actual_seq_kvlen
    if keys is not None and c.block_table is None:
        keys = [b - a for a, b in pairwise([0, *keys])]
    c.need(keys is None or all(a <= b for a, b in zip(rows, keys, strict=True)), "actual_seq_kvlen", f"at least {rows}")
    if c.sparse_mode == 4:
        c.need(c.pre_tokens >= 0 and c.next_tokens >= 0, "pre_tokens", "0 or more, as next_tokens")


def paged_attention(c: Given) -> None:
    """One query row a sequence, without a mask."""
    q, heads = c.tensor("query", HALF, (3,)), c.num_kv_heads
    for name in ("key_cache", "value_cache"):
        cache = c.tensor(name, HALF, (4,))
        c.alike(name, "query")
        c.need(cache.shape[2:] == (heads, q.shape[2]), name, f"rows of {(heads, q.shape[2])}")
    c.need(q.shape[1] == c.num_heads, "num_heads", f"the heads of query, {q.shape[1]}")
    c.need(heads > 0 and c.num_heads % heads == 0, "num_kv_heads", f"a divisor of num_heads ({c.num_heads})")
    size = c.key_cache.shape[1]
    c.need(size % 16 == 0 and size * q.shape[2] <= 128 * 128, "key_cache", "blocks of whole 16s; block * D up to 16384")
    table, lengths = c.tensor("block_table", (torch.int32,), (2,)), c.tensor("context_lens", (torch.int32,), (1,))
    c.need(lengths.device.type == "cpu", "context_lens", "a tensor of the host", f"on {lengths.device}")
    c.need(len(table) == len(lengths) == len(q), "context_lens", f"{len(q)} lengths, and as many rows of block_table")
    c.need(c.out.shape == q.shape and c.out.dtype == q.dtype, "out", f"the dtype and shape of query, {tuple(q.shape)}")
    _blocks(c, "context_lens", lengths.tolist(), size, len(c.key_cache))


CHECKS: dict[str, Check] = {
    "npu_fused_infer_attention_score_v2": attention,
    "_npu_paged_attention": paged_attention,
}
