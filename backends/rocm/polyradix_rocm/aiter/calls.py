"""Every call of AITER that is made, each in one method, with keywords: parameters have moved between versions.

CALLS has the keywords of each. A call whose installed signature does not take them is not made: `unfit` has the reason.
bf16 is torch.bfloat16, i32 torch.int32. Tensors are contiguous unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from polyradix_rocm.aiter.signatures import NAMES, Signatures

CALLS = {
    "rmsnorm2d_fwd": "input weight epsilon",
    "rmsnorm2d_fwd_with_add": "out input residual_in residual_out weight epsilon",
    "rope_cached_positions_2c_fwd": "input_x input_y cos sin positions rotate_style reuse_freqs_front_part nope_first",
    "paged_attention_ragged": "out workspace_buffer query key_cache value_cache scale kv_indptr kv_page_indices"
    " kv_last_page_lens block_size max_num_partitions alibi_slopes kv_cache_dtype kv_cache_layout logits_soft_cap"
    " k_scale v_scale",
    "mha_batch_prefill_func": "q k v cu_seqlens_q kv_indptr kv_page_indices max_seqlen_q max_seqlen_k softmax_scale"
    " logits_soft_cap causal window_size kv_last_page_lens",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal",
    "concat_and_cache_mla": "kv_c k_pe kv_cache slot_mapping kv_cache_dtype scale",
    "get_mla_metadata_info_v1": "batch_size max_seqlen_qo num_head_qo q_dtype kv_dtype is_sparse fast_mode",
    "get_mla_metadata_v1": "seqlens_qo_indptr seqlens_kv_indptr kv_last_page_lens num_heads_per_head_k num_heads_k"
    " is_causal work_metadata_ptrs work_info_set work_indptr reduce_indptr reduce_final_map reduce_partial_map"
    " page_size kv_granularity max_seqlen_qo uni_seqlen_qo fast_mode dtype_q dtype_kv",
    "mla_decode_fwd": "q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q sm_scale"
    " work_meta_data work_indptr work_info_set reduce_indptr reduce_final_map reduce_partial_map",
    "topk_softmax": "topk_weights topk_indices token_expert_indices gating_output need_renorm",
    "grouped_topk": "gating_output topk_weights topk_ids num_expert_group topk_group need_renorm is_softmax"
    " routed_scaling_factor",
    "biased_grouped_topk": "gating_output correction_bias topk_weights topk_ids num_expert_group topk_group"
    " need_renorm routed_scaling_factor",
    "shuffle_weight": "x layout",
    "fused_moe": "hidden_states w1 w2 topk_weight topk_ids",
    "per_group_quant_hip": "x quant_dtype group_size",
    "gemm_a8w8_blockscale": "XQ WQ x_scale w_scale dtype",
}
PATHS = {path.rpartition(".")[2]: path for path in NAMES}
PARTITION = 256  # keys of one partition of paged_attention_ragged
GROUPS = (1, 2, 4, 8)  # numbers of expert groups that the top-k kernels are compiled for
# Heads of mla_decode_fwd in bf16 with persistent metadata, by architecture: 32 and more are folded into groups of 16
# where no kernel takes them whole. On gfx950 folding ended with 0.1.20. From hsa/ARCH/mla/mla_asm.csv and mla.py.
FOLDED = tuple(range(16, 129, 16))
MLA_HEADS = {"0.1.10": {"gfx942": FOLDED, "gfx950": FOLDED}, "0.1.20": {"gfx942": FOLDED, "gfx950": (16, 32, 64)}}
MLA_WIDTH = (512, 64)  # columns of the latent and of the rotated key: the only ones


class Provider(Protocol):
    """AITER, or the simulator."""

    @property
    def version(self) -> str: ...  # the recorded one that counts for what kernels there are
    @property
    def arch(self) -> str: ...
    @property
    def signatures(self) -> Signatures: ...
    def function(self, path: str) -> Callable[..., Any]: ...


def keywords(name: str) -> tuple[str, ...]:
    return tuple(CALLS[name].split())


def misfit(name: str, signatures: Signatures) -> str | None:
    """Why the call cannot be made, None when it can."""
    signature = signatures.get(PATHS[name])
    if signature is None:
        return f"{PATHS[name]} is missing"
    given, known = set(keywords(name)), signature.parameters
    if unknown := sorted(given - known.keys()):
        return f"{PATHS[name]} does not take {', '.join(unknown)}"
    if wanted := [p.name for p in known.values() if p.default is p.empty and p.name not in given]:
        return f"{PATHS[name]} wants {', '.join(wanted)} too"
    return None


@dataclass(frozen=True)
class MlaWork:
    """What get_mla_metadata_v1 filled for one batch: work_metadata uint64 [2], and i32 work_indptr, work_info [n,8],
    reduce_indptr, reduce_final_map [n,2], reduce_partial_map."""

    work_meta_data: torch.Tensor
    work_indptr: torch.Tensor
    work_info_set: torch.Tensor
    reduce_indptr: torch.Tensor
    reduce_final_map: torch.Tensor
    reduce_partial_map: torch.Tensor


class Aiter:
    """The calls, over a provider. `unfit` has those that cannot be made, with the reason."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        reasons = {name: misfit(name, provider.signatures) for name in CALLS}
        self.unfit = {name: why for name, why in reasons.items() if why}
        self._functions: dict[str, Callable[..., Any]] = {}

    def has(self, *names: str) -> bool:
        return not any(name in self.unfit for name in names)

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            self._functions[name] = self.provider.function(PATHS[name])
        return self._functions[name]

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        """x bf16 [n,width], w bf16 [width] -> [n,width]."""
        out: torch.Tensor = self._function("rmsnorm2d_fwd")(input=x, weight=w, epsilon=eps)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum: bf16 [n,width] all."""
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._function("rmsnorm2d_fwd_with_add")(
            out=out, input=x, residual_in=residual, residual_out=total, weight=w, epsilon=eps
        )
        return out, total

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T,Hq,D] and k [T,Hk,D] bf16, last axis contiguous; cos and sin float32 [P,D/2]; positions int64 [T]."""
        x, y = self._function("rope_cached_positions_2c_fwd")(
            input_x=q[:, None], input_y=k[:, None], cos=cos[:, None, None], sin=sin[:, None, None],
            positions=positions[:, None], rotate_style=0, reuse_freqs_front_part=True, nope_first=False,
        )  # fmt: skip
        return x[:, 0], y[:, 0]

    def decode(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], indptr: torch.Tensor, slots: torch.Tensor,
        ones: torch.Tensor, longest: int, scale: float, softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """One query a sequence: q bf16 [S,Hq,D], kv bf16 [slots,1,Hk,D] each; i32 indptr [S+1], slots, ones [S];
        `longest` is at least the longest sequence -> [S,Hq,D]."""
        seqs, heads, dim = q.shape
        parts = -(-longest // PARTITION)
        room = seqs * heads * parts * (dim * q.element_size() + 2 * 4)
        out, workspace = torch.empty_like(q), torch.empty(room, dtype=torch.uint8, device=q.device)
        unit = torch.ones(1, dtype=torch.float32, device=q.device)
        self._function("paged_attention_ragged")(
            out=out, workspace_buffer=workspace, query=q, key_cache=kv[0], value_cache=kv[1], scale=scale,
            kv_indptr=indptr, kv_page_indices=slots, kv_last_page_lens=ones, block_size=1, max_num_partitions=parts,
            alibi_slopes=None, kv_cache_dtype="auto", kv_cache_layout="NHD", logits_soft_cap=softcap, k_scale=unit,
            v_scale=unit,
        )  # fmt: skip
        return out

    def prefill(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], cu_q: torch.Tensor, indptr: torch.Tensor,
        slots: torch.Tensor, ones: torch.Tensor, longest: tuple[int, int], scale: float, softcap: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """The newest tokens of each sequence: q bf16 [T,Hq,D]; i32 cu_q [S+1]; `longest` new, and in all; the rest as
        for `decode` -> [T,Hq,D]."""
        out: torch.Tensor = self._function("mha_batch_prefill_func")(
            q=q, k=kv[0], v=kv[1], cu_seqlens_q=cu_q, kv_indptr=indptr, kv_page_indices=slots, max_seqlen_q=longest[0],
            max_seqlen_k=longest[1], softmax_scale=scale, logits_soft_cap=softcap, causal=True,
            window_size=(-1 if window is None else window - 1, 0 if window is not None else -1),
            kv_last_page_lens=ones,
        )  # fmt: skip
        return out

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        longest: tuple[int, int], scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """q bf16 [T,H,D], k [L,H,D], v [L,H,Dv] of sequences one after another; i32 cu_q, cu_k [S+1] -> [T,H,Dv]."""
        out: torch.Tensor = self._function("flash_attn_varlen_func")(
            q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
            softmax_scale=scale, causal=True,
        )  # fmt: skip
        return out

    def write_latent(self, c: torch.Tensor, k: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """c bf16 [T,R] and k bf16 [T,rope] into cache [pages,page,R+rope] at slots int64 [T]."""
        unit = torch.ones(1, dtype=torch.float32, device=c.device)
        self._function("concat_and_cache_mla")(
            kv_c=c, k_pe=k, kv_cache=cache, slot_mapping=slots, kv_cache_dtype="auto", scale=unit
        )

    def mla_heads(self, heads: int) -> int | None:
        """What `heads` are padded to, None when no kernel serves so many."""
        known = MLA_HEADS[self.provider.version][self.provider.arch]
        return min((n for n in known if n >= heads), default=None)

    def mla_work(self, cu_q: torch.Tensor, indptr: torch.Tensor, ones: torch.Tensor, heads: int) -> MlaWork:
        """Of decodes with one query a sequence: i32 cu_q, indptr [S+1], ones [S]; heads as padded."""
        bf16 = torch.bfloat16
        info = self._function("get_mla_metadata_info_v1")(
            batch_size=len(ones), max_seqlen_qo=1, num_head_qo=heads, q_dtype=bf16, kv_dtype=bf16, is_sparse=False,
            fast_mode=True,
        )  # fmt: skip
        work = MlaWork(*(torch.empty(shape, dtype=dtype, device=cu_q.device) for shape, dtype in info))
        self._function("get_mla_metadata_v1")(
            seqlens_qo_indptr=cu_q, seqlens_kv_indptr=indptr, kv_last_page_lens=ones, num_heads_per_head_k=heads,
            num_heads_k=1, is_causal=True, work_metadata_ptrs=work.work_meta_data, work_info_set=work.work_info_set,
            work_indptr=work.work_indptr, reduce_indptr=work.reduce_indptr, reduce_final_map=work.reduce_final_map,
            reduce_partial_map=work.reduce_partial_map, page_size=1, kv_granularity=16, max_seqlen_qo=1,
            uni_seqlen_qo=1, fast_mode=True, dtype_q=bf16, dtype_kv=bf16,
        )  # fmt: skip
        return work

    def mla_decode(
        self, q: torch.Tensor, cache: torch.Tensor, cu_q: torch.Tensor, indptr: torch.Tensor, slots: torch.Tensor,
        ones: torch.Tensor, scale: float, work: MlaWork,
    ) -> torch.Tensor:  # fmt: skip
        """One absorbed query a sequence: q bf16 [S,H,576], H as padded; cache bf16 [slots,1,1,576] -> [S,H,512]."""
        out = q.new_empty(*q.shape[:2], MLA_WIDTH[0])
        self._function("mla_decode_fwd")(
            q=q, kv_buffer=cache, o=out, qo_indptr=cu_q, kv_indptr=indptr, kv_indices=slots, kv_last_page_lens=ones,
            max_seqlen_q=1, sm_scale=scale, **vars(work),
        )  # fmt: skip
        return out

    def topk_softmax(self, logits: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """logits float32 [T,E] -> ids i32 [T,k], weights float32 [T,k]."""
        ids, weights = _chosen(logits, k)
        self._function("topk_softmax")(
            topk_weights=weights, topk_indices=ids, token_expert_indices=torch.empty_like(ids), gating_output=logits,
            need_renorm=renormalise,
        )  # fmt: skip
        return ids, weights

    def topk_grouped(
        self, logits: torch.Tensor, k: int, groups: tuple[int, int], renormalise: bool, softmax: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As topk_softmax; of `groups` there are the first, and the second stay, by their best score."""
        ids, weights = _chosen(logits, k)
        # by position: in 0.1.10 keywords go on to C++, where topk_group has another name
        self._function("grouped_topk")(logits, weights, ids, *groups, renormalise, softmax, scale)
        return ids, weights

    def topk_biased(
        self, logits: torch.Tensor, bias: torch.Tensor, k: int, groups: tuple[int, int], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of sigmoid scores plus bias float32 [E], groups by the sum of their two best; weights are renormalised."""
        ids, weights = _chosen(logits, k)
        self._function("biased_grouped_topk")(
            gating_output=logits, correction_bias=bias.to(logits.dtype), topk_weights=weights, topk_ids=ids,
            num_expert_group=groups[0], topk_group=groups[1], need_renorm=True, routed_scaling_factor=scale,
        )  # fmt: skip
        return ids, weights

    def shuffled(self, w: torch.Tensor) -> torch.Tensor:
        """w bf16 [E,N,K] in the layout of fused_moe, marked so."""
        out: torch.Tensor = self._function("shuffle_weight")(x=w, layout=(16, 16))
        out.is_shuffled = True  # a Python attribute, which any new tensor made of this one loses
        return out

    def fused_moe(
        self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x bf16 [T,H]; gate_up [E,2F,H] and down [E,H,F] as `shuffled` makes them; SiLU -> [T,H]."""
        out: torch.Tensor = self._function("fused_moe")(
            hidden_states=x, w1=gate_up, w2=down, topk_weight=weights, topk_ids=ids
        )
        return out

    def quantised(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """x bf16 [M,K] -> of the chip's FP8 type [M,K], and a scale float32 [M,K/128] for each 128 columns of a row."""
        y, scale = self._function("per_group_quant_hip")(x=x, quant_dtype=dtype, group_size=128)
        return y, scale

    def block_product(
        self, x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
    ) -> torch.Tensor:
        """x [M,K] and w [N,K] of the chip's FP8 type, x_scale [M,K/128] and w_scale [N/128,K/128] float32 -> bf16."""
        out: torch.Tensor = self._function("gemm_a8w8_blockscale")(
            XQ=x, WQ=w, x_scale=x_scale, w_scale=w_scale, dtype=torch.bfloat16
        )
        return out


def _chosen(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.empty(len(logits), k, dtype=torch.int32, device=logits.device)
    return ids, torch.empty(len(logits), k, dtype=torch.float32, device=logits.device)
