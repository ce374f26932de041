"""AITER's calls as its sources document them, in float32 torch on any device: what they refuse, and what they compute.

A Provider for calls.py. Each call is bound to the recorded signature of a version, checked, and computed; what the real
call leaves unwritten is NaN. It repeats our reading of AITER, so it proves the adapters, not AITER.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import torch

from polyradix_rocm.aiter.calls import GROUPS, PARTITION, keywords
from polyradix_rocm.aiter.signatures import recorded

KERNELS: dict[str, dict[str, list[list[int]]]] = json.loads(
    files(__package__).joinpath("mla_kernels.json").read_text()
)  # bf16 decode kernels of hsa/ARCH/mla/mla_asm.csv: heads, whether persistent, the most queries of a sequence (0: any)
PROCESSORS = {"gfx942": 304, "gfx950": 256}
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
Sizes = tuple[tuple[Any, torch.dtype], ...]


class Refused(RuntimeError):
    """The real call would refuse this, or read and write what it should not."""


def need(good: bool, what: str) -> None:
    if not good:
        raise Refused(what)


def tensor(name: str, x: Any, shape: Sequence[int | None], dtype: torch.dtype, dense: bool = True) -> None:
    """x is a tensor of that shape, None for any size, and dtype; contiguous if `dense`, else in its last axis."""
    need(isinstance(x, torch.Tensor), f"{name} is {type(x).__name__}; expected a tensor")
    fits = len(shape) == x.dim() and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
    need(fits, f"{name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    need(x.dtype == dtype, f"{name} is {x.dtype}; expected {dtype}")
    need(x.is_contiguous() if dense else x.stride(-1) == 1 or x.shape[-1] == 1, f"{name} is not contiguous")


def ranges(indptr: torch.Tensor, name: str, total: int, seqs: int, exact: bool = True) -> list[int]:
    """A prefix sum i32 [seqs+1] from 0 to `total`, or to at most that."""
    tensor(name, indptr, (seqs + 1,), I32)
    at: list[int] = indptr.tolist()
    need(at[0] == 0 and at == sorted(at), f"{name} is {at}; expected to rise from 0")
    need(at[-1] == total if exact else at[-1] <= total, f"{name} ends at {at[-1]}; expected {total}")
    return at


def inside(name: str, x: torch.Tensor, end: int, lowest: int = 0) -> None:
    if x.numel():
        low, high = int(x.min()), int(x.max())
        need(lowest <= low and high < end, f"{name} goes from {low} to {high}; expected {lowest} to {end - 1}")


class Simulator:
    """`arch` is gfx942 or gfx950, `version` one that is recorded. `calls` counts those made, by name."""

    def __init__(self, arch: str, version: str) -> None:
        self.arch, self.version, self.signatures = arch, version, recorded(version)
        self.calls: dict[str, int] = {}
        self._work: dict[int, Any] = {}  # by the address of work_metadata: what it was filled for

    def function(self, path: str) -> Callable[..., Any]:
        return partial(self._call, path, path.rpartition(".")[2])

    def _call(self, path: str, name: str, /, *args: Any, **given: Any) -> Any:
        try:
            bound = self.signatures[path].bind(*args, **given)
        except TypeError as error:
            raise Refused(f"{name} of {self.version}: {error}") from error
        need(set(bound.arguments) == set(keywords(name)), f"{name}: not the arguments that CALLS has")
        if name == "grouped_topk":  # its C++ binding takes no topk_group by keyword
            need(not given, "grouped_topk takes its arguments by position")
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self, f"_{name}")(SimpleNamespace(**bound.arguments))

    def _rmsnorm2d_fwd(self, a: Any) -> torch.Tensor:
        width = a.input.shape[-1]
        tensor("input", a.input, (None, width), BF16)
        tensor("weight", a.weight, (width,), BF16)
        need(width % 8 == 0 and width <= 8192, f"rmsnorm: width {width}; expected a multiple of 8 up to 8192")
        return _normed(a.input.float(), a.weight, a.epsilon)

    def _rmsnorm2d_fwd_with_add(self, a: Any) -> None:
        for name in ("input", "residual_in", "residual_out", "out"):
            tensor(name, getattr(a, name), a.input.shape, BF16)
        total = a.input.float() + a.residual_in.float()  # which the real kernel norms before it is rounded
        a.residual_out.copy_(total)
        tensor("weight", a.weight, a.input.shape[-1:], BF16)
        a.out.copy_(_normed(total, a.weight, a.epsilon))

    def _rope_cached_positions_2c_fwd(self, a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (rows, one, _, dim), most = a.input_x.shape, a.cos.shape[0]
        for name in ("input_x", "input_y"):
            tensor(name, getattr(a, name), (rows, one, None, dim), BF16, dense=False)
        for name in ("cos", "sin"):
            tensor(name, getattr(a, name), (most, 1, 1, dim // 2), F32)
        tensor("positions", a.positions, (rows, one), I64)
        inside("positions", a.positions, most)
        need((a.rotate_style, a.reuse_freqs_front_part, a.nope_first) == (0, True, False), "rope: only half-split")
        cos, sin = (table[a.positions].view(rows, one, 1, dim // 2) for table in (a.cos, a.sin))
        return _rotated(a.input_x, cos, sin), _rotated(a.input_y, cos, sin)

    def _paged(self, a: Any, k: torch.Tensor, v: torch.Tensor, seqs: int) -> list[list[int]]:
        """The slots of each sequence, in a cache of pages of one token."""
        slots, _, heads, dim = k.shape
        tensor("k", k, (slots, 1, heads, dim), BF16)
        tensor("v", v, (slots, 1, heads, None), BF16)
        at = ranges(a.kv_indptr, "kv_indptr", a.kv_page_indices.numel(), seqs, exact=False)
        tensor("kv_page_indices", a.kv_page_indices, (None,), I32)
        inside("kv_page_indices", a.kv_page_indices[: at[-1]], slots)
        tensor("kv_last_page_lens", a.kv_last_page_lens, (seqs,), I32)
        inside("kv_last_page_lens", a.kv_last_page_lens, 2, 1)
        need(all(at[i] < at[i + 1] for i in range(seqs)), "a sequence has no key: its row would be 0 / 0")
        held = a.kv_page_indices.tolist()
        return [held[at[i] : at[i + 1]] for i in range(seqs)]

    def _paged_attention_ragged(self, a: Any) -> torch.Tensor:
        seqs, heads, dim = a.query.shape
        tensor("query", a.query, (seqs, heads, dim), BF16)
        tensor("out", a.out, (seqs, heads, dim), BF16)
        group = heads / a.key_cache.shape[2]
        need(dim in (64, 128) and group in range(1, 17), f"paged_attention: head_dim {dim}, {group:g} heads a kv head")
        need((a.block_size, a.kv_cache_dtype, a.kv_cache_layout) == (1, "auto", "NHD"), "paged_attention: the layout")
        for name in ("k_scale", "v_scale"):
            tensor(name, getattr(a, name), (1,), F32)
        held = self._paged(a, a.key_cache, a.value_cache, seqs)
        need(a.alibi_slopes is None, "paged_attention: alibi_slopes")
        longest = max(map(len, held))
        need(a.max_num_partitions * PARTITION >= longest, f"max_num_partitions is {a.max_num_partitions} for {longest}")
        room = seqs * heads * a.max_num_partitions * (dim * 2 + 8)
        tensor("workspace_buffer", a.workspace_buffer, (room,), torch.uint8)
        a.workspace_buffer.fill_(255)  # NaN
        for s, slots in enumerate(held):
            k, v = a.key_cache[slots, 0], a.value_cache[slots, 0]
            a.out[s : s + 1] = _attention(a.query[s : s + 1], k, v, a.scale, a.logits_soft_cap, -1)
        return a.out

    def _mha_batch_prefill_func(self, a: Any) -> torch.Tensor:
        rows, heads, dim = a.q.shape
        seqs = len(a.cu_seqlens_q) - 1
        tensor("q", a.q, (rows, heads, dim), BF16, dense=False)
        need(dim in (128, 256) if self.version == "0.1.20" else dim == 128, f"batch_prefill: head_dim {dim}")
        need(a.causal and heads % a.k.shape[2] == 0, "batch_prefill: not causal, or heads do not divide")
        at, held = ranges(a.cu_seqlens_q, "cu_seqlens_q", rows, seqs), self._paged(a, a.k, a.v, seqs)
        new = [at[i + 1] - at[i] for i in range(seqs)]
        need(max(new) <= a.max_seqlen_q and max(map(len, held)) <= a.max_seqlen_k, "batch_prefill: max_seqlen too low")
        left, right = a.window_size
        need(right == (0 if left >= 0 else -1), f"batch_prefill: window_size is {a.window_size}")
        out = torch.full_like(a.q, float("nan"), memory_format=torch.contiguous_format)
        for s, slots in enumerate(held):
            part, k, v = slice(at[s], at[s + 1]), a.k[slots, 0], a.v[slots, 0]
            out[part] = _attention(a.q[part], k, v, a.softmax_scale, a.logits_soft_cap, left)
        return out

    def _flash_attn_varlen_func(self, a: Any) -> torch.Tensor:
        (rows, heads, dim), (held, _, wide) = a.q.shape, a.v.shape
        seqs = len(a.cu_seqlens_q) - 1
        tensor("q", a.q, (rows, heads, dim), BF16, dense=False)
        tensor("k", a.k, (held, heads, dim), BF16, dense=False)
        tensor("v", a.v, (held, heads, wide), BF16, dense=False)
        need(a.causal and dim % 8 == wide % 8 == 0 and dim <= 256, f"varlen: head sizes {dim} and {wide}")
        at, ends = (
            ranges(a.cu_seqlens_q, "cu_seqlens_q", rows, seqs),
            ranges(a.cu_seqlens_k, "cu_seqlens_k", held, seqs),
        )
        out = a.q.new_full((rows, heads, wide), float("nan"))
        for s in range(seqs):
            part, keys = slice(at[s], at[s + 1]), slice(ends[s], ends[s + 1])
            fits = part.stop - part.start <= a.max_seqlen_q and keys.stop - keys.start <= a.max_seqlen_k
            need(fits, "varlen: max_seqlen too low")
            out[part] = _attention(a.q[part], a.k[keys], a.v[keys], a.softmax_scale, 0.0, -1)
        return out

    def _concat_and_cache_mla(self, a: Any) -> None:
        (rows, rank), rope = a.kv_c.shape, a.k_pe.shape[1]
        tensor("kv_c", a.kv_c, (rows, rank), BF16, dense=False)
        tensor("k_pe", a.k_pe, (rows, rope), BF16, dense=False)
        tensor("kv_cache", a.kv_cache, (None, None, rank + rope), BF16)
        tensor("slot_mapping", a.slot_mapping, (rows,), I64)
        inside("slot_mapping", a.slot_mapping, a.kv_cache.shape[0] * a.kv_cache.shape[1], -1)
        tensor("scale", a.scale, (1,), F32)
        need(a.kv_cache_dtype == "auto", f"kv_cache_dtype is {a.kv_cache_dtype!r}")
        kept = a.slot_mapping >= 0
        flat = a.kv_cache.view(-1, rank + rope)
        flat[a.slot_mapping[kept]] = torch.cat([a.kv_c, a.k_pe], dim=1)[kept]

    def _get_mla_metadata_info_v1(self, a: Any) -> Sizes:
        folds = 16 if self.version == "0.1.10" else 8
        need(a.num_head_qo % folds == 0, f"metadata: {a.num_head_qo} heads; expected a multiple of {folds}")
        need((a.q_dtype, a.kv_dtype, a.is_sparse, a.fast_mode) == (BF16, BF16, False, True), "metadata: the kind")
        return self._sizes(a.batch_size, a.max_seqlen_qo * a.num_head_qo)

    def _sizes(self, batch: int, rows: int) -> Sizes:
        """Upper bounds, as AITER's are; tiles are of 16 rows, or of 128 for 16 heads."""
        units, tiles = PROCESSORS[self.arch], -(-rows // (128 if rows == 16 else 16))
        most, split = (batch + units - 1) * tiles, min(batch + units - 1, 2 * (units - 1)) * tiles
        shapes: tuple[Any, ...] = (2, units + 1, (most, 8), batch * tiles + 1, (batch * tiles, 2), split)
        return tuple(zip(shapes, (torch.uint64, *[I32] * 5), strict=True))

    def _get_mla_metadata_v1(self, a: Any) -> None:
        batch = len(a.kv_last_page_lens)
        fields = [
            "work_metadata_ptrs",
            "work_indptr",
            "work_info_set",
            "reduce_indptr",
            "reduce_final_map",
            "reduce_partial_map",
        ]
        for name, (shape, dtype) in zip(fields, self._sizes(batch, a.num_heads_per_head_k), strict=True):
            tensor(name, getattr(a, name), (shape,) if isinstance(shape, int) else shape, dtype)
        need((a.max_seqlen_qo, a.uni_seqlen_qo, a.num_heads_k, a.is_causal) == (1, 1, 1, True), "metadata: not decode")
        need((a.page_size, a.kv_granularity, a.fast_mode) == (1, 16, True), "metadata: granularity, or mode")
        need((a.dtype_q, a.dtype_kv) == (BF16, BF16), "metadata: dtypes")
        indptr = ranges(a.seqlens_kv_indptr, "seqlens_kv_indptr", 1 << 31, batch, exact=False)
        ranges(a.seqlens_qo_indptr, "seqlens_qo_indptr", batch, batch)
        self._work[a.work_metadata_ptrs.data_ptr()] = (indptr, a.num_heads_per_head_k)

    def _mla_decode_fwd(self, a: Any) -> tuple[torch.Tensor, None]:
        seqs, heads, _ = a.q.shape
        tensor("q", a.q, (seqs, heads, 576), BF16)
        tensor("o", a.o, (seqs, heads, 512), BF16)
        tensor("kv_buffer", a.kv_buffer, (None, 1, 1, 576), BF16)
        self._check_heads(heads)
        ranges(a.qo_indptr, "qo_indptr", seqs, seqs)
        paged = SimpleNamespace(**{**vars(a), "kv_page_indices": a.kv_indices})
        held = self._paged(paged, a.kv_buffer, a.kv_buffer[..., :1].contiguous(), seqs)
        filled = self._work.get(a.work_meta_data.data_ptr())
        need(filled == (a.kv_indptr.tolist(), heads), "work_meta_data was not made for this batch")
        need(a.max_seqlen_q == 1, f"max_seqlen_q is {a.max_seqlen_q} for one query a sequence")
        for s, slots in enumerate(held):
            rows = a.kv_buffer[slots, 0]
            a.o[s : s + 1] = _attention(a.q[s : s + 1], rows, rows[..., :512], a.sm_scale, 0.0, -1)
        return torch.full((seqs, 1, heads, 512), float("nan"), device=a.q.device), None  # partial sums

    def _check_heads(self, heads: int) -> None:
        """As mla.py dispatches persistent decodes of one query: whole, in groups of 16, or not at all."""
        whole = heads == 16 or (self.arch == "gfx950" and self.version != "0.1.10")
        need(whole or heads in range(32, 129, 16), f"mla_decode_fwd: {heads} heads are not supported")
        served = heads if whole else 16
        rows = KERNELS[self.version][self.arch]
        need(
            any(n == served and persistent for n, persistent, _ in rows), f"mla_decode_fwd: no kernel for {heads} heads"
        )

    def _choosing(self, a: Any, ids: torch.Tensor) -> None:
        tokens, experts = a.gating_output.shape
        tensor("gating_output", a.gating_output, (tokens, experts), F32)
        tensor("topk_ids", ids, (tokens, None), I32)
        tensor("topk_weights", a.topk_weights, tuple(ids.shape), F32)
        need(not bool(a.gating_output.isnan().any()), "NaN among the logits: ids would be anything")

    def _topk_softmax(self, a: Any) -> None:
        self._choosing(a, a.topk_indices)
        tensor("token_expert_indices", a.token_expert_indices, a.topk_indices.shape, I32)
        score = a.gating_output.softmax(-1)
        _choose(a.topk_indices, a.topk_weights, score, score, a.need_renorm, 1.0)

    def _grouped_topk(self, a: Any) -> None:
        self._choosing(a, a.topk_ids)
        score = a.gating_output.softmax(-1) if a.is_softmax else a.gating_output.sigmoid()
        kept = self._in_groups(a, score, 1)
        _choose(a.topk_ids, a.topk_weights, kept, score, a.need_renorm, a.routed_scaling_factor)

    def _biased_grouped_topk(self, a: Any) -> None:
        self._choosing(a, a.topk_ids)
        tensor("correction_bias", a.correction_bias, a.gating_output.shape[1:], a.gating_output.dtype)
        need(a.need_renorm, "biased_grouped_topk: without need_renorm one of its kernels forgets the factor")
        score = a.gating_output.sigmoid()
        kept = self._in_groups(a, score + a.correction_bias, 2)
        _choose(a.topk_ids, a.topk_weights, kept, score, True, a.routed_scaling_factor)

    def _in_groups(self, a: Any, choice: torch.Tensor, best: int) -> torch.Tensor:
        groups, stay = a.num_expert_group, a.topk_group
        need(groups in GROUPS and choice.shape[1] % groups == 0, f"num_expert_group is {groups}; expected {GROUPS}")
        need(1 <= stay <= groups, f"topk_group is {stay} of {groups}")
        grouped = choice.unflatten(1, (groups, -1))
        need(grouped.shape[2] >= best, f"groups of {grouped.shape[2]}; expected at least {best}")
        value = grouped.sort(dim=2, descending=True).values[..., :best].sum(2)
        order = value.sort(dim=1, descending=True, stable=True).indices[:, :stay]
        out = torch.ones_like(value, dtype=torch.bool).scatter_(1, order, False)
        return grouped.masked_fill(out[..., None], float("-inf")).flatten(1)

    def _shuffle_weight(self, a: Any) -> torch.Tensor:
        need(a.layout == (16, 16) and a.x.element_size() == 2, "shuffle_weight: the layout")
        (_, n, k), w = a.x.shape, a.x
        need(n % 16 == k % 32 == 0, f"shuffle_weight: [{n},{k}]; expected multiples of 16 and 32")
        out = w.view(-1, n // 16, 16, k // 32, 4, 8).permute(0, 1, 3, 4, 2, 5).contiguous().view(w.shape)
        out.is_shuffled = True
        return out

    def _fused_moe(self, a: Any) -> torch.Tensor:
        (tokens, width), (experts, double, _) = a.hidden_states.shape, a.w1.shape
        tensor("hidden_states", a.hidden_states, (tokens, width), BF16)
        tensor("w1", a.w1, (experts, double, width), BF16)
        tensor("w2", a.w2, (experts, width, double // 2), BF16)
        marked = getattr(a.w1, "is_shuffled", False) and getattr(a.w2, "is_shuffled", False)
        need(marked, "fused_moe: w1 or w2 lost its mark is_shuffled")
        need(
            width % 128 == double % 256 == 0, f"fused_moe: widths {width} and {double // 2}; expected multiples of 128"
        )
        tensor("topk_ids", a.topk_ids, (tokens, None), I32)
        tensor("topk_weight", a.topk_weight, tuple(a.topk_ids.shape), F32)
        inside("topk_ids", a.topk_ids, experts)
        out = torch.zeros(tokens, width, dtype=F32, device=a.hidden_states.device)
        for e in a.topk_ids.unique().tolist():
            t, place = (a.topk_ids == e).nonzero(as_tuple=True)
            gate, up = (a.hidden_states[t].float() @ _unshuffled(a.w1[e]).float().t()).chunk(2, dim=-1)
            inner = (torch.nn.functional.silu(gate) * up).to(BF16).float()
            down = (inner @ _unshuffled(a.w2[e]).float().t()) * a.topk_weight[t, place, None]
            out.index_add_(0, t, down)
        return out.to(BF16)

    def _per_group_quant_hip(self, a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensor("x", a.x, (None, None), BF16)
        need(a.group_size in (32, 64, 128) and a.x.shape[1] % a.group_size == 0, f"group_size is {a.group_size}")
        need(a.quant_dtype == FP8[self.arch], f"quant_dtype is {a.quant_dtype}; {self.arch} has {FP8[self.arch]}")
        most = torch.finfo(a.quant_dtype).max
        grouped = a.x.float().unflatten(1, (-1, a.group_size))
        scale = grouped.abs().amax(-1) / most
        y = (grouped / scale.clamp(min=1e-30)[..., None]).clamp(-most, most).to(a.quant_dtype)
        return y.flatten(1), scale

    def _gemm_a8w8_blockscale(self, a: Any) -> torch.Tensor:
        (rows, k), n = a.XQ.shape, a.WQ.shape[0]
        tensor("XQ", a.XQ, (rows, k), FP8[self.arch])
        tensor("WQ", a.WQ, (n, k), FP8[self.arch])
        need(k % 128 == 0 and n % 128 == 0, f"gemm_a8w8_blockscale: [{n},{k}]; expected multiples of 128")
        tensor("x_scale", a.x_scale, (rows, k // 128), F32)
        tensor("w_scale", a.w_scale, (n // 128, k // 128), F32)
        need(a.dtype == BF16, f"dtype is {a.dtype}")
        x = a.XQ.float() * a.x_scale.repeat_interleave(128, 1)
        w = a.WQ.float() * a.w_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (x @ w.t()).to(BF16)


def _normed(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w.float()).to(BF16)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(BF16)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float, left: int
) -> torch.Tensor:  # fmt: skip
    """The newest len(q) tokens of one sequence: q [n,H,D], k [L,Hk,D], v [L,Hk,Dv] -> [n,H,Dv], in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    score = torch.matmul(q.float().transpose(0, 1), k.transpose(1, 2)) * scale
    if cap:
        score = cap * torch.tanh(score / cap)
    n, length = score.shape[1:]
    at = torch.arange(length - n, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    score = score.masked_fill((at < 0) | ((at > left) if left >= 0 else False), float("-inf"))
    return torch.matmul(score.softmax(-1), v).transpose(0, 1).to(q.dtype)


def _choose(
    ids: torch.Tensor, weights: torch.Tensor, choice: torch.Tensor, score: torch.Tensor, renormalise: bool, scale: float
) -> None:
    at = choice.sort(dim=1, descending=True, stable=True).indices[:, : ids.shape[1]]
    chosen = score.gather(1, at)
    ids.copy_(at)
    weights.copy_(chosen / chosen.sum(1, keepdim=True) * scale if renormalise else chosen * scale)


def _unshuffled(w: torch.Tensor) -> torch.Tensor:
    n, k = w.shape
    return w.view(n // 16, k // 32, 4, 16, 8).permute(0, 3, 1, 2, 4).reshape(n, k)
