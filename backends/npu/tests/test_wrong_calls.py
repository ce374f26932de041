"""Calls that the vendor's documents forbid are refused, each for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from polyradix_npu import calls
from polyradix_npu.contracts import CHECKS, WrongCall
from polyradix_npu.emulate.device import SimulatedDevice

BF16 = torch.bfloat16


def on(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to("npu")


def ids(rows: list[list[int]] | list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).to("npu")


def attend(layout: str = "TND", **changes: Any) -> None:
    """Two sequences of 3 and 1 new tokens, 130 and 7 in all, which is right until something is changed."""
    dim, heads = changes.pop("dim", 128), changes.pop("heads", 4)
    cache = changes.pop("cache", None)
    cache = on(5, 128, 2 * dim) if cache is None else cache
    more: dict[str, Any] = {
        "block_table": ids([[1, 2], [3, 0]]),
        "block_size": 128,
        "actual_seq_kvlen": [130, 7],
        "sparse_mode": 3,
        "atten_mask": calls.fixed_mask(torch.device("npu")),
    }
    if layout == "TND":
        more["actual_seq_qlen"] = [3, 4]
    q = changes.pop("q", on(4, 4, dim) if layout == "TND" else on(2, 1, 4, dim))
    calls.attend(q, (cache, changes.pop("values", cache)), layout, heads, 2, 0.1, **{**more, **changes})


def single(layout: str = "BSND", **changes: Any) -> None:
    attend(layout, **{"sparse_mode": 0, "atten_mask": None, **changes})


def paged(dim: int = 64, **changes: Any) -> None:
    cache, q = on(5, 128, 2, dim), on(2, 4, dim)
    lengths = torch.tensor([130, 7], dtype=torch.int32)
    heads = {"num_kv_heads": 2, "num_heads": 4, "scale_value": 0.1}
    places = {"block_table": ids([[1, 2], [3, 0]]), "context_lens": lengths, "out": torch.empty_like(q)}
    torch_npu._npu_paged_attention(query=q, key_cache=cache, value_cache=cache, **{**heads, **places, **changes})


def latent(heads: int = 4, rows: int = 1, layout: str = "BSND", **changes: Any) -> None:
    cache, size = on(5, 128, 512), changes.pop("size", 512)
    paged = {"block_table": ids([[1, 2]]), "block_size": 128, "actual_seq_kvlen": [130]}
    ropes = {"query_rope": on(1, rows, heads, 64), "key_rope": on(5, 128, 64)}
    q = on(1, rows, heads, size)
    calls.attend(
        q.flatten(2) if layout == "BSH" else q, (cache, cache), layout, heads, 1, 0.1, **{**paged, **ropes, **changes}
    )


def write(slots: list[int], page: int = 128, dtype: torch.dtype = BF16, **more: Any) -> None:
    caches = on(3, page, 2, 64), on(3, page, 2, 64)
    rows = on(len(slots), 2, 64, dtype=dtype)
    torch_npu.npu_scatter_pa_kv_cache(rows, rows, *caches, ids(slots), **{"cache_mode": "Norm", **more})


def grouped(**changes: Any) -> None:
    more = {"group_list": ids([2, 6], torch.int64), "split_item": 2, "group_type": 0, "group_list_type": 0}
    weight = changes.pop("weight", on(2, 32, 16))
    if "bias" in changes:
        changes["bias"] = [changes["bias"]]
    torch_npu.npu_grouped_matmul([on(6, 32)], [weight], **{**more, **changes})


def gate(experts: int = 16, **changes: Any) -> None:
    torch_npu.npu_moe_gating_top_k(on(3, experts, dtype=torch.float32), **{"k": 2, **changes})


def routed(chosen: torch.Tensor | None = None, **changes: Any) -> None:
    more = {"expert_num": 8, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "active_expert_range": [0, 8]}
    picked = ids([[0, 7], [3, 1]]) if chosen is None else chosen
    torch_npu.npu_moe_init_routing_v2(on(2, 32), picked, **{**more, **changes})


def combine(rows: torch.Tensor, scales: torch.Tensor, mode: int = 2) -> None:
    torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, ids([0, 1, 2, 3]), None, drop_pad_mode=mode)


def dispatch(experts: int = 8, world: int = 2, rank: int = 0, group: str = "none", **changes: Any) -> None:
    x, chosen = changes.pop("x", on(2, 64)), changes.pop("chosen", ids([[0, 7], [3, 1]]))
    torch_npu.npu_moe_distribute_dispatch_v2(x, chosen, group, world, rank, experts, **changes)


def collect(**changes: Any) -> None:
    f32, i32 = {"dtype": torch.float32}, {"dtype": torch.int32}
    more = {"expand_x": on(8, 64), "expert_ids": ids([[0, 7], [3, 1]]), "expert_scales": on(2, 2, **f32)}
    told = {
        "assist_info_for_combine": on(8 * 128, **i32),
        "ep_send_counts": on(8, **i32),
        "expand_scales": on(8, **f32),
    }
    ranks = {"group_ep": "none", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 8}
    torch_npu.npu_moe_distribute_combine_v2(**{**more, **told, **ranks, **changes})


RIGHT: dict[str, Callable[[], Any]] = {
    "attention in TND": attend,
    "windows": lambda: attend(sparse_mode=4, pre_tokens=6, next_tokens=0),
    "sinks": lambda: attend(learnable_sink=on(4)),
    "one query row": single,
    "one query row in BSH": lambda: single("BSH", q=on(2, 1, 512)),
    "ATB's attention": paged,
    "latent attention": latent,
    "latent attention, several rows": lambda: latent(
        rows=3, sparse_mode=3, atten_mask=calls.fixed_mask(torch.device("npu"))
    ),
    "the cache": lambda: write([128, 300, 5]),
    "grouped product": grouped,
    "grouped product with biases": lambda: grouped(bias=on(2, 16, dtype=torch.float32)),
    "a clamped gate": lambda: calls.clamped(on(3, 64), 7.0, 1.7),
    "gate": lambda: gate(group_count=4, k_group=2),
    "routing": routed,
    "combining": lambda: combine(on(4, 8), on(2, 2)),
}

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "head size 64 in TND": (lambda: attend(dim=64), "heads of 128 or 192"),
    "no mask": (lambda: attend(atten_mask=None), "atten_mask is None"),
    "a small mask": (lambda: attend(atten_mask=on(128, 128).bool()), r"\(2048, 2048\)"),
    "a lower mask": (
        lambda: attend(atten_mask=calls.fixed_mask(torch.device("npu")).t().contiguous()),
        "above the diag",
    ),
    "int64 pages": (lambda: attend(block_table=ids([[1, 2], [3, 0]], torch.int64)), "block_table is int64"),
    "a page that is not there": (lambda: attend(block_table=ids([[1, 5], [3, 0]])), "blocks from 0 to 4"),
    "too few pages": (lambda: attend(block_table=ids([[1], [3]])), "lengths up to 128"),
    "running sums of keys with pages": (lambda: attend(actual_seq_kvlen=[130, 300]), "they are no sums"),
    "lengths of queries, no sums": (lambda: attend(actual_seq_qlen=[3, 1]), "do not fall"),
    "query rows left over": (lambda: attend(actual_seq_qlen=[2, 3]), "4 at its end"),
    "more query rows than keys": (lambda: attend(actual_seq_kvlen=[2, 7]), "actual_seq_kvlen is"),
    "no lengths": (lambda: attend(actual_seq_kvlen=None), "a list"),
    "four axes in TND": (lambda: attend(q=on(1, 4, 4, 128)), "3 dimensions"),
    "a wrong number of heads": (lambda: attend(heads=8), "the heads of query, 4"),
    "float32 queries": (lambda: attend(q=on(4, 4, 128, dtype=torch.float32)), "float16 or bfloat16"),
    "values in another dtype": (lambda: attend(values=on(5, 128, 256, dtype=torch.float16)), "the dtype of query"),
    "a wrong block size": (lambda: attend(block_size=64), r"blocks of block_size \(64\)"),
    "sinks of float32": (lambda: attend(learnable_sink=on(4, dtype=torch.float32)), "learnable_sink is float32"),
    "a sink for each kv head": (lambda: attend(learnable_sink=on(2)), "one for each query head"),
    "sinks of wide heads": (lambda: attend(dim=192, learnable_sink=on(4)), "at most 128 with learnable_sink"),
    "sinks in another layout": (lambda: single(learnable_sink=on(4)), "TND with learnable_sink"),
    "sinks and a sum": (lambda: attend(learnable_sink=on(4), summed=True), "return_softmax_lse is True"),
    "an unknown sparse mode": (lambda: attend(sparse_mode=2), "0, 3 or 4"),
    "an unknown layout": (lambda: attend("BNSD"), "input_layout is BNSD"),
    "heads that do not cut BSH": (lambda: single("BSH", q=on(2, 1, 510)), "num_query_heads is 4"),
    "latent rows in BSH": (lambda: latent(layout="BSH"), "None with BSH"),
    "lengths on the device": (lambda: paged(context_lens=ids([130, 7])), "context_lens is on npu"),
    "int64 lengths": (lambda: paged(context_lens=torch.tensor([130, 7])), "context_lens is int64"),
    "a page that ATB lacks": (lambda: paged(block_table=ids([[1, 5], [3, 0]])), "blocks from 0 to 4"),
    "too few pages for ATB": (lambda: paged(block_table=ids([[1], [3]])), "lengths up to 128"),
    "wide heads for ATB": (lambda: paged(dim=256), "block \\* D up to 16384"),
    "a result of another shape": (lambda: paged(out=on(4, 4, 64)), "the dtype and shape of query"),
    "a wrong number of kv heads": (lambda: paged(num_kv_heads=4), r"rows of \(4, 64\)"),
    "a mode on one row": (lambda: single(sparse_mode=3), "no effect on a single query row"),
    "a mask of another width": (lambda: single(atten_mask=ids([[[[0]]], [[[0]]]]).bool()), r"shape \(2, 1, 1, 256\)"),
    "small pages for several rows": (
        lambda: attend("BSND", q=on(2, 3, 4, 64), cache=on(5, 64, 128), dim=64, block_size=64, actual_seq_kvlen=[9, 7]),
        "whole 128s",
    ),
    "three latent heads": (lambda: latent(heads=3), "num_query_heads is 3"),
    "rope of the query alone": (lambda: latent(key_rope=None), "key_rope is None"),
    "many latent rows": (lambda: latent(rows=17, sparse_mode=3), "at most 16"),
    "latent rows of 256": (lambda: latent(size=256), "128 or 512 columns"),
    "slots twice": (lambda: write([128, 128]), "distinct slots"),
    "a slot out of range": (lambda: write([384]), "slots from 0 to 383"),
    "the default cache mode": (lambda: write([1], cache_mode="PA_NZ"), "'Norm'"),
    "rows of another dtype": (lambda: write([1], dtype=torch.float16), "the dtype of key"),
    "a gamma of float16": (lambda: calls.rms_norm(on(3, 64), on(64, dtype=torch.float16), 1e-5), "gamma is float16"),
    "a gamma of another width": (lambda: calls.rms_norm(on(3, 64), on(32), 1e-5), "the last axes of input"),
    "residuals of another shape": (lambda: calls.add_rms_norm(on(3, 64), on(2, 64), on(64), 1e-5), "the shape of x1"),
    "cos of another dtype": (
        lambda: calls.rotate(on(3, 2, 64), on(3, 64, dtype=torch.float32), on(3, 64)),
        "the dtype of input",
    ),
    "an odd gate": (lambda: calls.swiglu(on(3, 63)), "an even axis"),
    "groups of two experts": (lambda: gate(group_count=8, k_group=8), "more than 2 experts"),
    "renormalising in the gate": (lambda: gate(renorm=1), "renorm is 1"),
    "too many chosen": (lambda: gate(k=9, group_count=4, k_group=2), "1 to 8"),
    "expert ids of int64": (lambda: routed(ids([[0, 7], [3, 1]], torch.int64)), "expected int32"),
    "an expert that is not there": (lambda: routed(ids([[0, 8], [3, 1]])), "ids from 0 to 7"),
    "running sums of experts": (lambda: routed(expert_tokens_num_type=0), "1 or 2"),
    "an odd clamped gate": (lambda: calls.clamped(on(3, 63), 7.0, 1.7), "an even axis"),
    "biases in bfloat16": (lambda: grouped(bias=on(2, 16)), r"bias is torch.bfloat16"),
    "one bias for all": (lambda: grouped(bias=on(16, dtype=torch.float32)), r"float32 \(2, 16\)"),
    "groups beyond the rows": (lambda: grouped(group_list=ids([2, 7], torch.int64)), "up to 6 rows in all"),
    "groups that end before they begin": (lambda: grouped(group_list=ids([4, 2], torch.int64)), "up to 6 rows"),
    "groups of int32": (lambda: grouped(group_list=ids([2, 6])), "group_list is int32"),
    "many results": (lambda: grouped(split_item=0), "2 or 3"),
    "matrices turned around": (lambda: grouped(weight=on(2, 16, 32)), "32 rows in each matrix"),
    "weights of another dtype": (lambda: combine(on(4, 8), on(2, 2, dtype=torch.float32)), "the dtype of expanded"),
    "rows in column order": (lambda: combine(on(4, 8), on(2, 2), mode=0), "drop_pad_mode is 0"),
    "a group that is not there": (dispatch, "expected the name of a group that there is"),
    "no group": (lambda: dispatch(group=""), "the name of an HCCL communicator"),
    "one rank": (lambda: dispatch(world=1), "ep_world_size is 1"),
    "a rank too many": (lambda: dispatch(rank=2), "ep_rank_id is 2; expected 0 to 1"),
    "experts that cannot be shared": (lambda: dispatch(experts=9), "a multiple of 2"),
    "many experts for a rank": (lambda: dispatch(experts=50), "1 to 24 for each rank"),
    "narrow rows": (lambda: dispatch(x=on(2, 40)), "whole 32s of columns"),
    "rows of float32 sent": (lambda: dispatch(x=on(2, 64, dtype=torch.float32)), "float16 or bfloat16"),
    "an expert twice": (lambda: dispatch(chosen=ids([[0, 7], [3, 3]])), "distinct ids in a row"),
    "an expert that no rank has": (lambda: dispatch(chosen=ids([[0, 8], [3, 1]])), "ids from 0 to 7"),
    "quantised rows": (lambda: dispatch(quant_mode=2), "quant_mode is 2"),
    "weights in bfloat16": (lambda: dispatch(expert_scales=on(2, 2)), "expert_scales is bfloat16"),
    "a tp group": (lambda: dispatch(group_tp="other", tp_world_size=2), "group_tp is other"),
    "fewer rows back": (lambda: collect(expand_x=on(4, 64)), "8 rows, as were dispatched"),
    "other marks": (lambda: collect(assist_info_for_combine=on(8, dtype=torch.int32)), "1024 values, as dispatched"),
    "other counts": (lambda: collect(ep_send_counts=on(2, dtype=torch.int32)), "at least 8 values"),
    "a weight too few": (lambda: collect(expert_scales=on(2, 1, dtype=torch.float32)), "the shape of expert_ids"),
    "an unknown format": (lambda: torch_npu.npu_format_cast(on(16, 16), 4), "acl_format is 4"),
    "an op without a contract": (lambda: torch_npu.npu_fast_gelu(on(3, 4)), "no contract of it"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_right_calls_are_taken(what: str, device: SimulatedDevice) -> None:
    RIGHT[what]()


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls_are_refused(what: str, device: SimulatedDevice) -> None:
    call, reason = WRONG[what]
    with pytest.raises(WrongCall, match=reason):
        call()


def test_every_op_has_a_contract_and_a_reference() -> None:
    from polyradix_npu import contracts_attention, contracts_exchange
    from polyradix_npu.emulate.reference import OPS

    assert set(OPS) == {*CHECKS, *contracts_attention.CHECKS, *contracts_exchange.CHECKS}
