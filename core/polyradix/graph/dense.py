"""The decoder of every family: its parameters and graph. graph/moe.py has experts, graph/mla.py latent attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from polyradix.backend.protocol import (
    KV,
    Array,
    AttnSpec,
    DType,
    LayerBody,
    Meta,
    Ops,
    Params,
    ParamSpec,
    Step,
    Weight,
)
from polyradix.backend.shard import local_param
from polyradix.graph import mla, moe
from polyradix.graph.spec import ModelSpec


@dataclass(frozen=True)
class ParamTable:
    """`layers[i]` holds the parameters of layer i, in the order of the graph; a name is unique inside its list."""

    top: tuple[ParamSpec, ...]
    layers: tuple[tuple[ParamSpec, ...], ...]

    def bytes(self, tp: int) -> int:
        """Of the weights, without biases, on each of `tp` ranks; a backend's padding comes on top."""
        each = (p for group in (self.top, *self.layers) for p in group)
        return sum(local_param(p, tp).bytes for p in each)


def param_specs(spec: ModelSpec, dtype: DType, max_context: int | None = None) -> ParamTable:
    """Parameters with shapes and shards. `max_context` caps the rope table, which is as long as the model allows."""
    positions = min(spec.max_position, max_context or spec.max_position)
    turned = spec.latent.attention.rope if spec.latent else spec.heads.dim
    top = (
        ParamSpec("embed", "embed", (spec.vocab, spec.hidden), dtype),
        ParamSpec("rope", "rope", (positions, turned), "float32"),
        *([ParamSpec("local_rope", "rope", (positions, turned), "float32")] if spec.local_rope else ()),
        _norm(spec, "first_norm", dtype),
        ParamSpec("logits", "logits", (spec.vocab, spec.hidden), dtype, shard_axis=0),
    )
    return ParamTable(top, tuple(_layer(spec, dtype, i) for i in range(spec.layers)))


def _layer(spec: ModelSpec, dtype: DType, index: int) -> tuple[ParamSpec, ...]:
    hidden, heads = spec.hidden, spec.heads
    mixed = heads.q * (spec.latent.attention.v if spec.latent else heads.dim)
    return (
        *(mla.param_specs(spec.latent, hidden, dtype) if spec.latent else _qkv(spec, dtype)),
        ParamSpec("o", "linear_reduce", (hidden, mixed), dtype, (), 1, spec.o_bias),
        *([_norm(spec, "attn_post_norm", dtype)] if spec.post_norms else ()),
        _norm(spec, "mlp_norm", dtype),
        *_feed_forward(spec, dtype, index),
        *([_norm(spec, "mlp_post_norm", dtype)] if spec.post_norms else ()),
        _norm(spec, "next_norm", dtype),
    )


def _norm(spec: ModelSpec, name: str, dtype: DType, width: int | None = None) -> ParamSpec:
    """An offset is added in float32, and the sum stays that."""
    return ParamSpec(name, "norm", (width or spec.hidden,), "float32" if spec.norm_offset else dtype)


def _qkv(spec: ModelSpec, dtype: DType) -> list[ParamSpec]:
    heads = spec.heads
    q, kv = heads.q * heads.dim, heads.kv * heads.dim
    out = [ParamSpec("qkv", "linear", (q + 2 * kv, spec.hidden), dtype, (q, kv, kv), 0, spec.qkv_bias)]
    if spec.qk_norm:
        out += [_norm(spec, name, dtype, heads.dim) for name in ("q_norm", "k_norm")]
    if spec.sinks:
        out.append(ParamSpec("sinks", "sinks", (heads.q,), "float32", shard_axis=0))
    return out


def _feed_forward(spec: ModelSpec, dtype: DType, index: int) -> list[ParamSpec]:
    if spec.experts is not None and index not in spec.experts.dense_layers:
        return moe.param_specs(spec.experts, spec.hidden, dtype)
    hidden, inner = spec.hidden, spec.intermediate
    return [
        ParamSpec("gate_up", "linear", (2 * inner, hidden), dtype, (inner, inner), 0, spec.mlp_bias),
        ParamSpec("down", "linear_reduce", (hidden, inner), dtype, (), 1, spec.mlp_bias),
    ]


_PARTS = {
    **mla.PARTS,
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "sinks": ("self_attn.sinks",),
    "o": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


_POST_NORM_PARTS = {
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}


def sources(spec: ModelSpec, name: str, layer: int | None = None) -> tuple[str, ...]:
    """Checkpoint names (without `.weight`, `.bias`) whose rows make up a parameter; () for a computed rope table."""
    if name == "next_norm" and layer is not None:
        return ("model.norm",) if layer + 1 == spec.layers else (f"model.layers.{layer + 1}.input_layernorm",)
    if layer is not None:
        experts = spec.experts.routing.experts if spec.experts else 0
        known = _PARTS | (_POST_NORM_PARTS if spec.post_norms else {})
        parts = known[name] if name in known else moe.parts(spec.architecture, experts, name)
        return tuple(f"model.layers.{layer}.{part}" for part in parts)
    return {
        "embed": ("model.embed_tokens",),
        "rope": (),
        "local_rope": (),
        "first_norm": ("model.layers.0.input_layernorm",),
        "logits": ("model.embed_tokens",) if spec.tie_embeddings else ("lm_head",),
    }[name]


def pieces(spec: ModelSpec, p: ParamSpec, layer: int | None = None) -> list[tuple[str, int]]:
    """As `sources`, with the rows that each has; those of experts, and of heads, follow one another."""
    names = sources(spec, p.name, layer)
    rows = (prod(p.shape[:-1]) // len(names),) * len(names) if len(p.shape) == 3 else p.segments or p.shape[:1]
    return list(zip(names, rows, strict=bool(names)))


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor the model reads, biases included, with its shape."""
    table, out = param_specs(spec, spec.dtype), {}
    for layer, params in [(None, table.top), *enumerate(table.layers)]:
        for p in params:
            for name, rows in pieces(spec, p, layer):
                out[f"{name}.weight"] = (rows, *p.shape[1:][-1:])
                if p.bias:
                    out[f"{name}.bias"] = (rows,)
    return out


def make_step(spec: ModelSpec) -> Step:
    """The graph. The carry is (x, h): x is h already normed for whoever comes next, so norms fuse with additions."""
    heads, eps = spec.heads, spec.rms_eps
    plain = AttnSpec(heads, spec.attn_scale or heads.dim**-0.5, None, spec.softcap)
    kinds = [replace(plain, window=spec.window) if i in spec.windowed else plain for i in range(spec.layers)]

    def step(ops: Ops, params: Params, kv: KV, m: Meta) -> tuple[Array, KV]:
        top = params.top

        def mix(x: Array, w: dict[str, Weight], kv: KV, a: AttnSpec) -> tuple[Array, KV]:
            if spec.latent is not None:
                return mla.attend(ops, x, top["rope"], w, kv, m, spec.latent)
            q, k, v = ops.qkv(x, w["qkv"], heads)
            if spec.qk_norm:
                q, k = ops.rms_norm(q, w["q_norm"], eps), ops.rms_norm(k, w["k_norm"], eps)
            q, k = ops.rope(q, k, top["local_rope" if a.window and spec.local_rope else "rope"], m)
            return ops.attend(q, k, v, kv, m, replace(a, sinks=w["sinks"]) if spec.sinks else a)

        def feed(w: dict[str, Weight], a: Array, h: Array) -> tuple[Array, Array]:
            y = ops.linear_reduce(a, w["o"])
            if spec.post_norms:
                y = ops.rms_norm(y, w["attn_post_norm"], eps)
            x, h = ops.add_rms_norm(y, h, w["mlp_norm"], eps)
            if spec.experts is not None and "router" in w:
                y = moe.feed(ops, x, w, spec.experts.routing)
            else:
                y = ops.linear_reduce(ops.linear_gated(x, w["gate_up"], spec.gate), w["down"])
            if spec.post_norms:
                y = ops.rms_norm(y, w["mlp_post_norm"], eps)
            return ops.add_rms_norm(y, h, w["next_norm"], eps)

        def layer(a: AttnSpec, last: bool = False) -> LayerBody:
            def body(w: dict[str, Weight], carry: tuple[Array, Array], kv: KV) -> tuple[tuple[Array, Array], KV]:
                x, h = carry
                x, kv = mix(x, w, kv, a)
                if last:  # nobody asks for the other rows any more
                    x, h = ops.last(x, m), ops.last(h, m)
                return feed(w, x, h), kv

            return body

        each = {a: layer(a) for a in kinds}
        bodies = [*(each[a] for a in kinds[:-1]), layer(kinds[-1], last=True)]
        h = ops.embed(top["embed"], m)
        (x, _), kv = ops.layers(bodies, params.layers, (ops.rms_norm(h, top["first_norm"], eps), h), kv)
        return ops.logits(x, top["logits"], spec.logits_softcap), kv

    return step
