"""What the vendor's documents allow of each op that we call, as checks of its arguments.

Sources: the wheel's own documents (torch_npu/_op_plugin_docs.py) and Ascend/op-plugin's docs/context, for the Atlas A2
and A3. Rules of attention are in contracts_attention.py, of ops between ranks in contracts_exchange.py. The simulated
device holds every call against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


class WrongCall(ValueError):
    """A call that the vendor's documents forbid."""


class Given(SimpleNamespace):
    """One call's arguments by their names in the schema. `values` is False where tensors hold no values yet."""

    op: str
    values: bool

    def need(self, good: Any, name: str, expected: str, value: Any = None) -> None:
        """Raises WrongCall naming the argument, its value and what was expected."""
        if not good:
            shown = getattr(self, name, None) if value is None else value
            if isinstance(shown, torch.Tensor):
                shown = f"{str(shown.dtype).removeprefix('torch.')} {tuple(shown.shape)}"
            raise WrongCall(f"{self.op}: {name} is {shown}; expected {expected}")

    def tensor(self, name: str, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...], contiguous: bool = True) -> Any:
        """The argument, which has one of these dtypes and numbers of dimensions."""
        x = getattr(self, name)
        self.need(x.dtype in dtypes, name, " or ".join(str(d).removeprefix("torch.") for d in dtypes))
        self.need(x.dim() in dims, name, f"{' or '.join(map(str, dims))} dimensions")
        self.need(x.is_contiguous() or not contiguous, name, "a contiguous tensor", f"of strides {x.stride()}")
        return x

    def alike(self, name: str, other: str) -> None:
        """Both have the same dtype."""
        same = getattr(self, name).dtype == getattr(self, other).dtype
        self.need(same, name, f"the dtype of {other}, {getattr(self, other).dtype}")


Check = Callable[[Given], None]


def bind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the schema's defaults."""
    names, defaults = _declared(func)
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)


@cache
def _declared(func: Any) -> tuple[list[str], dict[str, Any]]:
    declared = func._schema.arguments
    return [a.name for a in declared], {a.name: a.default_value for a in declared if a.has_default_value()}


def mapped(given: dict[str, Any], fn: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """`given` with every tensor, in lists too, replaced."""

    def of(x: Any) -> Any:
        return fn(x) if isinstance(x, torch.Tensor) else [of(each) for each in x] if isinstance(x, list) else x

    return {name: of(value) for name, value in given.items()}


def check(op: str, given: dict[str, Any], values: bool = True) -> None:
    """Raises WrongCall for a call that the documents forbid, and for an op that has no contract here."""
    from polyradix_npu import contracts_attention, contracts_exchange

    checks: dict[str, Check] = CHECKS | contracts_attention.CHECKS | contracts_exchange.CHECKS
    name = op.partition("::")[2] or op
    if name not in checks:
        raise WrongCall(f"{op}: no contract of it is known; expected one of {', '.join(sorted(checks))}")
    checks[name](Given(op=name, values=values, **given))


def rms_norm(c: Given) -> None:
    c.tensor("input", FLOATS, tuple(range(1, 9)))
    c.tensor("gamma", FLOATS, tuple(range(1, 9)))
    c.need(c.gamma.dtype in (c.input.dtype, torch.float32), "gamma", f"the dtype of input, {c.input.dtype}, or float32")
    c.need(c.gamma.shape == c.input.shape[-c.gamma.dim() :], "gamma", f"the last axes of input, {tuple(c.input.shape)}")


def add_rms_norm(c: Given) -> None:
    c.tensor("x1", FLOATS, tuple(range(1, 9)))
    c.tensor("x2", FLOATS, tuple(range(1, 9)))
    c.alike("x2", "x1")
    c.alike("gamma", "x1")
    c.need(c.x1.shape == c.x2.shape, "x2", f"the shape of x1, {tuple(c.x1.shape)}")
    c.need(c.gamma.shape == c.x1.shape[-1:], "gamma", f"the last axis of x1, {tuple(c.x1.shape)}")


def rotary_mul(c: Given) -> None:
    c.tensor("input", FLOATS, (4,))
    for name in ("r1", "r2"):
        r = c.tensor(name, FLOATS, (4,))
        c.alike(name, "input")
        c.need(r.shape[0] in (1, c.input.shape[0]), name, f"1 or {c.input.shape[0]} at the first axis")
        fits = r.shape[1] in (1, c.input.shape[1]) and r.shape[2] in (1, c.input.shape[2])
        c.need(fits and r.shape[3] == c.input.shape[3], name, f"to broadcast to {tuple(c.input.shape)}")
    c.need(c.rotary_mode in ("half", "interleave"), "rotary_mode", "'half' or 'interleave'")
    width = c.input.shape[-1]
    c.need(width < 896 and width % 2 == 0, "input", "an even last axis below 896")
    c.need(c.input.shape[0] < 1000 and c.input.shape[2] < 1000, "input", "B and N of BSND below 1000")


def swiglu(c: Given) -> None:
    x = c.tensor("input", FLOATS, tuple(range(1, 9)))
    c.need(x.shape[c.dim] % 2 == 0, "input", f"an even axis {c.dim}")
    c.need(x.numel(), "input", "some elements")


def clipped_swiglu(c: Given) -> None:
    x = c.tensor("x", FLOATS, tuple(range(2, 9)))
    c.need(x.shape[c.dim] % 2 == 0, "x", f"an even axis {c.dim}")
    c.need(c.group_index is None, "group_index", "None")


def scatter_pa_kv_cache(c: Given) -> None:
    """The second of its documented cases: rows [T,N,D] into caches [blocks, block, N, D]."""
    c.need(c.cache_mode in (None, "Norm"), "cache_mode", "'Norm', as the caches are ND (the default is PA_NZ)")
    for name in ("key", "value"):
        rows, cache = c.tensor(name, FLOATS, (3,)), c.tensor(f"{name}_cache", FLOATS, (4,))
        c.alike(f"{name}_cache", "key")
        c.need(cache.shape[2:] == rows.shape[1:], f"{name}_cache", f"rows of {tuple(rows.shape[1:])}")
    c.alike("value", "key")
    c.need(c.key.shape[:2] == c.value.shape[:2], "value", f"tokens and heads of key, {tuple(c.key.shape[:2])}")
    slots = c.tensor("slot_mapping", (torch.int32, torch.int64), (1,))
    c.need(len(slots) == len(c.key), "slot_mapping", f"one slot for each of {len(c.key)} tokens")
    _slots(c, slots.cpu(), c.key_cache.shape[0] * c.key_cache.shape[1])


def _slots(c: Given, slots: torch.Tensor, room: int) -> None:
    if c.values:
        inside = bool(((slots >= 0) & (slots < room)).all())
        c.need(inside, "slot_mapping", f"slots from 0 to {room - 1}", f"{slots.min()} to {slots.max()}")
        real = slots[slots >= c.key_cache.shape[1]]  # padding rows all go to page 0, which nobody reads
        c.need(len(real.unique()) == len(real), "slot_mapping", "distinct slots", real.tolist())


def gating_top_k_softmax(c: Given) -> None:
    x = c.tensor("x", FLOATS, (2, 3))
    c.need(0 < c.k <= min(1024, x.shape[-1]), "k", f"1 to {min(1024, x.shape[-1])}")
    c.need(c.finished is None, "finished", "None")


def gating_top_k(c: Given) -> None:
    x = c.tensor("x", FLOATS, (2,), contiguous=False)
    experts = x.shape[1]
    c.need(experts <= 2048, "x", "at most 2048 experts")
    if c.bias is not None:
        c.tensor("bias", FLOATS, (1,), contiguous=False)
        c.alike("bias", "x")
        c.need(len(c.bias) == experts, "bias", f"{experts} values")
    c.need(c.group_count > 0 and experts % c.group_count == 0, "group_count", f"a divisor of {experts}")
    size = experts // c.group_count
    c.need(size > 2, "group_count", "more than 2 experts in a group")
    c.need(-(-size // 32) * 32 * c.group_count <= 2048, "group_count", "groups of whole 32s, 2048 in all")
    c.need(1 <= c.k_group <= c.group_count, "k_group", f"1 to group_count ({c.group_count})")
    c.need(1 <= c.k <= size * c.k_group, "k", f"1 to {size * c.k_group}")
    c.need(c.group_select_mode in (0, 1), "group_select_mode", "0 (largest) or 1 (sum of the two largest)")
    c.need(c.renorm == 0, "renorm", "0")
    c.need(c.norm_type in (0, 1), "norm_type", "0 (softmax) or 1 (sigmoid)")


def init_routing(c: Given) -> None:
    x, ids = c.tensor("x", FLOATS, (2,)), c.tensor("expert_idx", (torch.int32,), (2,))
    c.need(len(x) == len(ids), "expert_idx", f"{len(x)} rows")
    c.need(0 < c.expert_num <= 10240, "expert_num", "1 to 10240")
    c.need(c.drop_pad_mode == 0, "drop_pad_mode", "0")
    c.need(c.expert_tokens_num_type in (1, 2), "expert_tokens_num_type", "1 or 2")
    c.need(c.expert_tokens_num_flag, "expert_tokens_num_flag", "True")
    c.need(c.quant_mode == -1, "quant_mode", "-1")
    first, last = c.active_expert_range
    c.need(0 <= first < last <= c.expert_num, "active_expert_range", f"a range inside 0 to {c.expert_num}")
    c.need(c.row_idx_type in (0, 1), "row_idx_type", "0 (gather) or 1 (scatter)")
    c.need(c.active_num >= -1, "active_num", "at least -1")
    if c.values:
        held = ids.cpu()
        c.need(bool(((held >= 0) & (held < c.expert_num)).all()), "expert_idx", f"ids from 0 to {c.expert_num - 1}")


def grouped_matmul(c: Given) -> None:
    """One x, one weight of three axes, groups along the rows. The documents have the groups take all rows; vLLM-Ascend
    leaves rows of experts on other ranks at the end."""
    c.need(len(c.x) == len(c.weight) == 1, "x", "one tensor, as weight", f"{len(c.x)} with {len(c.weight)} weights")
    x, w = c.x[0], c.weight[0]
    c.need(x.dim() == 2 and x.is_contiguous(), "x", "two axes, contiguous", tuple(x.shape))
    c.need(w.dim() == 3, "weight", "three axes", tuple(w.shape))
    c.need(x.dtype in FLOATS and x.dtype == w.dtype, "weight", f"the dtype of x, {x.dtype}", w.dtype)
    c.need(x.shape[1] == w.shape[1], "weight", f"{x.shape[1]} rows in each matrix", tuple(w.shape))
    c.need(max(x.shape[1], w.shape[2]) < 65536, "weight", "inner axes below 65536", tuple(w.shape))
    if c.bias is not None:
        (bias,) = c.bias
        want = x.dtype if x.dtype == torch.float16 else torch.float32
        shape = (len(w), w.shape[2])
        c.need(bias.dtype == want and bias.shape == shape, "bias", f"{want} {shape}", f"{bias.dtype} {bias.shape}")
    c.need(c.split_item in (2, 3), "split_item", "2 or 3, as there is one result")
    c.need(c.group_type == 0, "group_type", "0")
    c.need(c.group_list_type in (0, 1), "group_list_type", "0 (running sums) or 1 (counts)")
    groups = c.tensor("group_list", (torch.int64,), (1,))
    c.need(len(groups) == len(w) <= 1024, "group_list", f"one for each of {len(w)} matrices, at most 1024")
    c.need(c.group_list_type == 0 or len(groups) > 1, "group_list", "more than one count")
    if c.values:
        held = groups.cpu()
        rows, steps = int(held.sum() if c.group_list_type else held[-1]), held if c.group_list_type else held.diff()
        right = rows <= len(x) and bool((held >= 0).all() and (steps >= 0).all())
        c.need(right, "group_list", f"groups of up to {len(x)} rows in all", held.tolist())


def finalize_routing(c: Given) -> None:
    rows = c.tensor("expanded_permuted_rows", FLOATS, (2,))
    c.need(c.drop_pad_mode == 2, "drop_pad_mode", "2, as rows of init_routing_v2 are in row order")
    c.need(c.skip1 is None and c.skip2 is None and c.bias is None, "skip1", "None, as skip2 and bias")
    scales, order = c.tensor("scales", FLOATS, (2,)), c.tensor("expanded_src_to_dst_row", (torch.int32,), (1,))
    c.alike("scales", "expanded_permuted_rows")
    c.need(scales.numel() == len(rows), "scales", f"{len(rows)} in all")
    c.need(len(order) == len(rows), "expanded_src_to_dst_row", f"{len(rows)} rows")
    if c.values:
        held = order.cpu()
        inside = bool(((held >= 0) & (held < len(rows))).all())
        c.need(inside, "expanded_src_to_dst_row", f"rows from 0 to {len(rows) - 1}", held.tolist())


def format_cast(c: Given) -> None:
    c.need(c.acl_format in (2, 29), "acl_format", "2 (ND) or 29 (FRACTAL_NZ)")
    c.tensor("input", (*FLOATS, torch.int8), (2, 3))


CHECKS: dict[str, Check] = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_init_routing_v2": init_routing,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_format_cast": format_cast,
}
