"""Mixture of experts in place of a feed-forward: its parameters, their names, and its graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

from polyradix.backend.protocol import Array, DType, MoeSpec, MoeWeights, Ops, ParamSpec, Weight

STACKED = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"  # one tensor for all experts: [experts, out, in]


SHARED = {
    "shared_gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_down": ("mlp.shared_experts.down_proj",),
}


@dataclass(frozen=True)
class Experts:
    """`intermediate` is the width of one expert, `shared` that of all experts together that every token goes to.
    `dense_layers` have an ordinary feed-forward instead. `bias`: the router has one; `biased`: so do the experts."""

    routing: MoeSpec
    intermediate: int
    dense_layers: frozenset[int] = frozenset()
    shared: int = 0
    bias: bool = False
    biased: bool = False


@dataclass(frozen=True)
class Names:
    """How an architecture spells its checkpoint tensors, inside a layer; `{}` is an expert's id."""

    router: str
    gate: str
    up: str
    down: str


_QWEN = Names("mlp.gate", *(f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")))
_MIXTRAL = Names("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{part}" for part in ("w1", "w3", "w2")))


_GPT_OSS = replace(_QWEN, router="mlp.router")


def names(architecture: str) -> Names:
    return {"MixtralForCausalLM": _MIXTRAL, "GptOssForCausalLM": _GPT_OSS}.get(architecture, _QWEN)


def param_specs(x: Experts, hidden: int, dtype: DType) -> list[ParamSpec]:
    count, inner = x.routing.experts, x.intermediate
    shared = [
        ParamSpec("shared_gate_up", "linear", (2 * x.shared, hidden), dtype, (x.shared, x.shared), 0),
        ParamSpec("shared_down", "linear_reduce", (hidden, x.shared), dtype, (), 1),
    ]
    return [
        ParamSpec("router", "router", (count, hidden), "float32", bias=x.bias),
        ParamSpec("experts_gate_up", "experts", (count, 2 * inner, hidden), dtype, (), 0, x.biased),
        ParamSpec("experts_down", "experts", (count, hidden, inner), dtype, (), 0, x.biased),
        *(shared if x.shared else ()),
    ]


def parts(architecture: str, experts: int, name: str) -> tuple[str, ...]:
    """Checkpoint names, inside a layer, whose rows one after the other make up a parameter of `param_specs`."""
    n, ids = names(architecture), range(experts)
    if name == "router":
        return (n.router,)
    if name in SHARED:
        return SHARED[name]
    spelled = (n.down,) if name == "experts_down" else (n.gate, n.up)
    return tuple(part.format(e) for e in ids for part in spelled)


def feed(ops: Ops, x: Array, w: dict[str, Weight], s: MoeSpec) -> Array:
    y = ops.moe(x, MoeWeights(w["router"], w["experts_gate_up"], w["experts_down"]), s)
    if "shared_down" in w:
        y = ops.add(y, ops.linear_reduce(ops.linear_gated(x, w["shared_gate_up"], "silu"), w["shared_down"]))
    return y
