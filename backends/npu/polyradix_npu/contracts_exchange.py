"""The documented rules of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2, which send rows to the
ranks of their experts and back: what the Atlas A2 and A3 allow, without shared experts, quantisation, a tp group."""

from __future__ import annotations

from typing import Any

import torch

from polyradix_npu.contracts import HALF, Check, Given

WORLDS = (*range(2, 9), 16, 32, 64, 128, 256)
UNUSED = {
    "group_tp": "", "tp_world_size": 0, "tp_rank_id": 0, "expert_shard_type": 0, "shared_expert_num": 1,
    "shared_expert_rank_num": 0, "global_bs": 0, "zero_expert_num": 0, "copy_expert_num": 0, "const_expert_num": 0,
    "comm_alg": "", "x_active_mask": None, "elastic_info": None, "performance_info": None,
}  # fmt: skip


def room(c: Any) -> int:
    """Rows that a rank may receive: those of every rank, for each of its own experts that a token can choose."""
    tokens, top_k = c.expert_ids.shape
    return int(tokens * c.ep_world_size * min(c.moe_expert_num // c.ep_world_size, top_k))


def _ranks(c: Given, width: int) -> None:
    ids = c.tensor("expert_ids", (torch.int32,), (2,))
    tokens, top_k = ids.shape
    c.need(1 <= len(c.group_ep) < 128, "group_ep", "the name of an HCCL communicator, 1 to 127 characters")
    c.need(c.ep_world_size in WORLDS, "ep_world_size", f"one of {WORLDS}")
    c.need(0 <= c.ep_rank_id < c.ep_world_size, "ep_rank_id", f"0 to {c.ep_world_size - 1}")
    own, left = divmod(c.moe_expert_num, c.ep_world_size)
    c.need(left == 0 and 0 < own <= 24, "moe_expert_num", f"a multiple of {c.ep_world_size}, 1 to 24 for each rank")
    c.need(width % 32 == 0 and 0 < width <= 7168, "x", "whole 32s of columns, up to 7168", width)
    c.need(0 < tokens <= 256, "expert_ids", "1 to 256 tokens")
    c.need(0 < top_k <= min(16, c.moe_expert_num), "expert_ids", f"1 to {min(16, c.moe_expert_num)} choices")
    for name, value in UNUSED.items():
        c.need(getattr(c, name) == value, name, f"{value!r}: no contract of others is known here")
    if c.values:
        held = ids.cpu().sort(dim=1).values
        inside = bool(((held >= 0) & (held < c.moe_expert_num)).all())
        c.need(inside, "expert_ids", f"ids from 0 to {c.moe_expert_num - 1}", held.tolist())
        c.need(bool((held[:, 1:] != held[:, :-1]).all()), "expert_ids", "distinct ids in a row", held.tolist())


def _weights(c: Given, name: str) -> None:
    c.tensor(name, (torch.float32,), (2,))
    c.need(getattr(c, name).shape == c.expert_ids.shape, name, f"the shape of expert_ids, {tuple(c.expert_ids.shape)}")


def dispatch(c: Given) -> None:
    x = c.tensor("x", HALF, (2,))
    _ranks(c, x.shape[1])
    c.need(len(x) == len(c.expert_ids), "expert_ids", f"{len(x)} rows")
    c.need(c.quant_mode == 0 and c.scales is None, "quant_mode", "0, and no scales")
    c.need(c.expert_token_nums_type in (0, 1), "expert_token_nums_type", "0 (running sums) or 1 (counts)")
    if c.expert_scales is not None:
        _weights(c, "expert_scales")


def combine(c: Given) -> None:
    """What `dispatch` gave comes back untouched, but for the rows."""
    rows = c.tensor("expand_x", HALF, (2,))
    _ranks(c, rows.shape[1])
    _weights(c, "expert_scales")
    most = room(c)
    c.need(len(rows) == most, "expand_x", f"{most} rows, as were dispatched")
    assist = c.tensor("assist_info_for_combine", (torch.int32,), (1,))
    c.need(len(assist) == 128 * most, "assist_info_for_combine", f"{128 * most} values, as dispatched")
    counts = c.tensor("ep_send_counts", (torch.int32,), (1,))
    c.need(len(counts) >= c.moe_expert_num, "ep_send_counts", f"at least {c.moe_expert_num} values, as dispatched")
    c.need(c.comm_quant_mode == 0, "comm_quant_mode", "0")
    if c.expand_scales is not None:
        scales = c.tensor("expand_scales", (torch.float32,), (1,))
        c.need(len(scales) == most, "expand_scales", f"{most} values, as dispatched")


CHECKS: dict[str, Check] = {
    "npu_moe_distribute_dispatch_v2": dispatch,
    "npu_moe_distribute_combine_v2": combine,
}
