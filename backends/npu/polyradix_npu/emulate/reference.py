"""What each vendor op computes, on CPU tensors, in float32 inside; written from the documents, not from the vendor's
code. Attention is in reference_attention.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from polyradix_npu.emulate.exchange import combine, dispatch
from polyradix_npu.emulate.reference_attention import attention, paged_attention

Args = SimpleNamespace


def run(op: str, given: dict[str, Any], write: bool) -> Any:
    """The op's results. Tensors that the op changes are changed only if `write`."""
    return OPS[op.partition("::")[2] or op](Args(write=write, **given))


def rms_norm(c: Args) -> tuple[torch.Tensor, torch.Tensor]:
    x, axes = c.input.float(), tuple(range(-c.gamma.dim(), 0))
    scale = 1 / (x.square().mean(axes, keepdim=True) + c.epsilon).sqrt()
    return (x * scale * c.gamma.float()).to(c.input.dtype), scale


def add_rms_norm(c: Args) -> tuple[torch.Tensor, ...]:
    total = (c.x1.float() + c.x2.float()).to(c.x1.dtype)
    return *rms_norm(Args(input=total, gamma=c.gamma, epsilon=c.epsilon)), total


def rotary_mul(c: Args) -> torch.Tensor:
    x, cos, sin = c.input.float(), c.r1.float(), c.r2.float()
    if c.rotary_mode == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(c.input.dtype)


def swiglu(c: Args) -> torch.Tensor:
    gate, up = c.input.float().chunk(2, dim=c.dim)
    return (gate / (1 + (-gate).exp()) * up).to(c.input.dtype)


def clipped_swiglu(c: Args) -> torch.Tensor:
    x = c.x.float().movedim(c.dim, -1)
    a, b = (x[..., ::2], x[..., 1::2]) if c.interleaved else x.chunk(2, dim=-1)
    a, b = a.clamp(max=c.limit), b.clamp(-c.limit, c.limit)
    return (a / (1 + (-c.alpha * a).exp()) * (b + c.bias)).movedim(-1, c.dim).to(c.x.dtype)


def scatter(c: Args) -> None:
    if c.write:
        for rows, cache in ((c.key, c.key_cache), (c.value, c.value_cache)):
            cache.flatten(0, 1)[c.slot_mapping.long()] = rows


def gating_top_k_softmax(c: Args) -> tuple[torch.Tensor, ...]:
    score = c.x.float().softmax(-1)
    ids = score.sort(dim=-1, descending=True, stable=True).indices[..., : c.k]
    tokens = ids.shape[0]
    order = torch.arange(c.k)[None] * tokens + torch.arange(tokens)[:, None]
    return score.gather(-1, ids).to(c.x.dtype), ids.int(), order.int()


def gating_top_k(c: Args) -> tuple[torch.Tensor, ...]:
    x = c.x.float()
    score = x.sigmoid() if c.norm_type else x.softmax(-1)
    choice = score if c.bias is None else score + c.bias.float()
    if c.group_count > 1:
        parts = choice.unflatten(1, (c.group_count, -1))
        best = parts.sort(dim=-1, descending=True).values[..., : 1 + c.group_select_mode].sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : c.k_group]
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        choice = parts.masked_fill(outside[..., None], -float("inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : c.k]
    y = score.gather(1, ids)
    if c.norm_type:
        y = y / (y.sum(-1, keepdim=True) + c.eps)
    return (y * c.routed_scaling_factor).to(c.x.dtype), ids.int(), score


def init_routing(c: Args) -> tuple[torch.Tensor, ...]:
    ids, top = c.expert_idx.flatten().long(), c.expert_idx.shape[1]
    first, last = c.active_expert_range
    ours = (ids >= first) & (ids < last)
    order = torch.where(ours, ids, c.expert_num).sort(stable=True).indices
    held = int(ours.sum())
    rows = c.x[order // top]
    rows[held:] = float("nan")
    index = torch.full_like(ids, -1)
    if c.row_idx_type == 0:
        index[order[:held]] = torch.arange(held)
    else:
        index[:held] = order[:held]
    counts = ids[ours].bincount(minlength=c.expert_num)[first:last]
    if c.expert_tokens_num_type != 1:
        raise NotImplementedError("expert_tokens_num_type 2")
    return rows, index.int(), counts, torch.full((len(ids),), float("nan"))


def grouped_matmul(c: Args) -> list[torch.Tensor]:
    (x,), (w,) = c.x, c.weight
    bias = c.bias[0] if c.bias else torch.zeros(len(w), w.shape[2])
    ends = c.group_list.cumsum(0) if c.group_list_type else c.group_list
    out, start = torch.full((len(x), w.shape[2]), float("nan"), dtype=x.dtype), 0
    for matrix, more, end in zip(w, bias.float(), ends.tolist(), strict=True):
        if end > start:
            out[start:end] = (x[start:end].float() @ matrix.float() + more).to(x.dtype)
        start = max(start, end)
    return [out]


def finalize(c: Args) -> torch.Tensor:
    picked = c.expanded_permuted_rows[c.expanded_src_to_dst_row.long()].float()
    parts = picked.view(*c.scales.shape, -1) * c.scales.float()[..., None]
    return parts.sum(1).to(c.expanded_permuted_rows.dtype)


def format_cast(c: Args) -> torch.Tensor:
    return c.input.clone(memory_format=torch.contiguous_format)


OPS: dict[str, Callable[[Args], Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_scatter_pa_kv_cache": scatter,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_init_routing_v2": init_routing,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_finalize_routing": finalize,
    "npu_format_cast": format_cast,
    "npu_fused_infer_attention_score_v2": attention,
    "_npu_paged_attention": paged_attention,
    "npu_moe_distribute_dispatch_v2": dispatch,
    "npu_moe_distribute_combine_v2": combine,
}
