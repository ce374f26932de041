"""Every call of the vendor's ops, under our names. Nothing else in this package calls torch_npu's ops.

What each allows is in contracts.py. T tokens, S sequences, H hidden size, N heads, D head size, P pages of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch_npu

FRACTAL_NZ = 29
MASK = 2048  # rows and columns of the fixed mask
Told = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # by `dispatch` to `collect`: opaque, as chips differ
CAUSAL, BAND = 3, 4  # of sparse_mode: causal from the last key back, and that within a window


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last axis; w [H] in the dtype of x."""
    out: torch.Tensor = torch_npu.npu_rms_norm(x.contiguous(), w, eps)[0]
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum normed, and the sum."""
    normed, _, total = torch_npu.npu_add_rms_norm(x.contiguous(), residual.contiguous(), w, eps)
    return normed, total


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split pairs of x [T,N,D]; cos and sin [T,D], each half of which is the same, in the dtype of x."""
    r1, r2 = cos[None, :, None], sin[None, :, None]
    out: torch.Tensor = torch_npu.npu_rotary_mul(x[None].contiguous(), r1, r2, "half")
    return out[0]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """[T,2F] -> [T,F]: silu of the first half times the second."""
    out: torch.Tensor = torch_npu.npu_swiglu(x.contiguous(), dim=-1)
    return out


def clamped(x: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """[T,2F] -> [T,F]: gpt-oss's gate, see MoeSpec."""
    out: torch.Tensor = torch_npu.npu_clipped_swiglu(
        x.contiguous(), dim=-1, alpha=alpha, limit=limit, bias=1.0, interleaved=False
    )
    return out


def write(k: torch.Tensor, v: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor) -> None:
    """Rows [T,N,D] into caches [pages, page, N, D], at int32 slots [T]."""
    torch_npu.npu_scatter_pa_kv_cache(k.contiguous(), v.contiguous(), *kv, slots, cache_mode="Norm")


def fixed_mask(device: torch.device) -> torch.Tensor:
    """What CAUSAL and BAND want beside their numbers."""
    return torch.ones(MASK, MASK, dtype=torch.int8).triu(1).to(device)


def attend(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    layout: str,
    heads: int,
    kv_heads: int,
    scale: float,
    summed: bool = False,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention in `layout`; `more` are npu_fused_infer_attention_score_v2's keywords. The output in q's layout;
    and if `summed`, the log of the sum of exp(score), float32 [T,N,1] in TND and [B,N,S,1] otherwise."""
    out, log_sum = torch_npu.npu_fused_infer_attention_score_v2(
        q.contiguous(),
        *kv,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        softmax_scale=scale,
        input_layout=layout,
        return_softmax_lse=summed,
        **more,
    )
    return out, log_sum


def attend_singles(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    kv_len: list[int],
    heads: int,
    kv_heads: int,
    scale: float,
) -> torch.Tensor:
    """ATB's attention of one new token a sequence: q and output [S,N,D], caches [pages, page, kv heads, D]. OSError
    without the NNAL package."""
    out = torch.empty_like(q)
    torch_npu._npu_paged_attention(
        query=q.contiguous(),
        key_cache=kv[0],
        value_cache=kv[1],
        num_kv_heads=kv_heads,
        num_heads=heads,
        scale_value=scale,
        block_table=pages,
        context_lens=torch.tensor(kv_len, dtype=torch.int32),
        out=out,
    )
    return out


def gate_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T,k] in the dtype of the logits [T,E], and ids int32 [T,k], best first; not renormalised."""
    weights, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.contiguous(), None, k)
    return weights, ids


def gate(
    logits: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    by_two: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As gate_softmax, with groups and a selection bias. Weights of a sigmoid are renormalised, then times `scale`.
    `by_two`: a group counts as much as the sum of its two best values, not the best alone."""
    weights, ids, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        k,
        bias=bias,
        k_group=top_groups,
        group_count=groups,
        group_select_mode=int(by_two),
        renorm=0,
        norm_type=int(sigmoid),
        routed_scaling_factor=scale,
        eps=1e-20,
    )
    return weights, ids


def by_expert(
    x: torch.Tensor, ids: torch.Tensor, experts: int, some: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of choices [T,k] among `experts`, those of `some`: rows [T*k,H] sorted by expert, of which the last are undefined
    if not all are; where each choice went, int32 [T*k], -1 for others'; rows of each of `some`, int64."""
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.contiguous(),
        ids,
        active_num=ids.numel(),
        expert_num=experts,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[some.start, some.stop],
        row_idx_type=0,
    )
    return rows, where, counts


def grouped(x: torch.Tensor, w: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows [n,in] times the matrix of their group, w [E,in,out], plus its bias, float32 [E,out]; `sums` int64 [E] are
    where each group ends. What is made of rows beyond the last is undefined."""
    out: torch.Tensor = torch_npu.npu_grouped_matmul(
        [x], [w], bias=None if bias is None else [bias], group_list=sums, split_item=2, group_type=0, group_list_type=0
    )[0]
    return out


def combine(rows: torch.Tensor, weights: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The sum over choices [T,k] of weight times row: [T,H] in the dtype of both."""
    out: torch.Tensor = torch_npu.npu_moe_finalize_routing(
        rows, None, None, None, weights, where, None, drop_pad_mode=2
    )
    return out


@dataclass(frozen=True)
class Ranks:
    """Ranks that hold equal runs of experts, in an HCCL communicator of that name, which serves nothing else."""

    group: str
    size: int
    rank: int


def dispatch(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, ranks: Ranks, experts: int
) -> tuple[torch.Tensor, torch.Tensor, Told]:
    """Sends rows [T,H] to the ranks of their experts, ids int32 [T,k] of all `experts`. Gives the rows that came here,
    by expert, of which the last may be undefined; int64 [experts/size] how many each expert has; and what `collect`
    wants untouched. The A2 sums inside a machine first, so it takes the weights, float32 [T,k], along; the A3 does not
    allow it."""
    hierarchy = torch.npu.get_device_name().startswith("Ascend910B")
    rows, _, marks, counts, sums, _, scales = torch_npu.npu_moe_distribute_dispatch_v2(
        x.contiguous(),
        ids,
        ranks.group,
        ranks.size,
        ranks.rank,
        experts,
        expert_scales=weights if hierarchy else None,
        expert_token_nums_type=1,
    )
    return rows, counts, (marks, sums, scales if hierarchy else None)


def collect(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    ranks: Ranks,
    experts: int,
    told: Told,
) -> torch.Tensor:
    """Sends what experts made of the rows of `dispatch` back, and sums weight times row: [T,H]."""
    out: torch.Tensor = torch_npu.npu_moe_distribute_combine_v2(
        expand_x=rows,
        expert_ids=ids,
        assist_info_for_combine=told[0],
        ep_send_counts=told[1],
        expand_scales=told[2],
        expert_scales=weights,
        group_ep=ranks.group,
        ep_world_size=ranks.size,
        ep_rank_id=ranks.rank,
        moe_expert_num=experts,
    )
    return out


def fractal(w: torch.Tensor) -> torch.Tensor:
    """The same matrix or matrices in the layout that the cube unit reads, FRACTAL_NZ."""
    torch.npu.config.allow_internal_format = True
    out: torch.Tensor = torch_npu.npu_format_cast(w.contiguous(), FRACTAL_NZ)
    return out
