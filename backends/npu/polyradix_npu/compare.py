"""Every call of a vendor's op held against its contract, and its result against the reference, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from polyradix_npu import contracts
from polyradix_npu.emulate import reference

MOST = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # of the largest value: what an error may be
EXACT = {torch.int32, torch.int64}
# How many of its results the backend asks an op for; the rest may be undefined.
ASKED = {
    "npu_fused_infer_attention_score_v2": 1,
    "npu_moe_gating_top_k": 2,
    "npu_moe_gating_top_k_softmax": 2,
    "npu_moe_init_routing_v2": 3,
    "npu_rms_norm": 1,
}


@dataclass
class Seen:
    """Of one op: calls, the largest error as a share of the reference's largest value, and what was wrong, if anything
    was."""

    calls: int = 0
    worst: float = 0.0
    wrong: str = ""


class Compared(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """`seen` by op. Formats and workspaces are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Seen] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        if name not in reference.OPS or name == "npu_format_cast":
            return func(*args, **kwargs)
        given, seen = contracts.bind(func, args, kwargs), self.seen.setdefault(name, Seen())
        held = contracts.mapped(given, lambda x: x.cpu())
        seen.calls += 1
        try:
            contracts.check(name, given)
            want = reference.run(name, held, write=True)
            out = got = func(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            seen.wrong = seen.wrong or str(error).partition("\n")[0]
            raise
        if name == "npu_scatter_pa_kv_cache":
            got, want = (given["key_cache"], given["value_cache"]), (held["key_cache"], held["value_cache"])
        elif name == "_npu_paged_attention":
            got, want = given["out"], held["out"]
        elif name in ASKED:
            want = want[: ASKED[name] + bool(given.get("return_softmax_lse"))]
        for x, y in zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=False):
            _compare(seen, x.cpu(), y)
        return out


def _compare(seen: Seen, got: torch.Tensor, want: torch.Tensor) -> None:
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        seen.wrong = seen.wrong or f"{got.dtype} {tuple(got.shape)}; expected {want.dtype} {tuple(want.shape)}"
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
    seen.worst = max(seen.worst, float(error))
    if not error <= (0 if want.dtype in EXACT else MOST[want.dtype]):
        seen.wrong = seen.wrong or f"error {float(error):.2g} of the largest value, {want.dtype} {tuple(want.shape)}"
