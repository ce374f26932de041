"""Multi-head latent attention (DeepSeek, Mistral Large 3): its parameters, their names, and its graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyradix.backend.protocol import (
    KV,
    Array,
    DType,
    HostArray,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    Meta,
    Ops,
    ParamSpec,
    Weight,
)

PARTS = {
    "q": ("self_attn.q_proj",),
    "q_a": ("self_attn.q_a_proj",),
    "q_a_norm": ("self_attn.q_a_layernorm",),
    "q_b": ("self_attn.q_b_proj",),
    "kv_a": ("self_attn.kv_a_proj_with_mqa",),
    "kv_a_norm": ("self_attn.kv_a_layernorm",),
    "kv_b": ("self_attn.kv_b_proj",),
    "index_q": ("self_attn.indexer.wq_b",),
    "index_k": ("self_attn.indexer.wk",),
    "index_norm": ("self_attn.indexer.k_norm",),
    "index_weights": ("self_attn.indexer.weights_proj",),
}


@dataclass(frozen=True)
class Latent:
    """`q_rank`: queries come through a normed vector of so many numbers, None: at once. `interleaved`: a checkpoint
    has the two rows of a rope pair side by side, though never those of the indexer, which needs a q_rank."""

    attention: LatentSpec
    q_rank: int | None
    interleaved: bool
    bias: bool = False  # of q_a and kv_a
    index: IndexSpec | None = None


def param_specs(x: Latent, hidden: int, dtype: DType) -> list[ParamSpec]:
    """What comes before attention's output projection."""
    a = x.attention
    wide = a.heads * (a.nope + a.rope)
    q = [ParamSpec("q", "linear", (wide, hidden), dtype, (), 0)]
    if x.q_rank is not None:
        q = [
            ParamSpec("q_a", "linear", (x.q_rank, hidden), dtype, bias=x.bias),
            ParamSpec("q_a_norm", "norm", (x.q_rank,), dtype),
            ParamSpec("q_b", "linear", (wide, x.q_rank), dtype, (), 0),
        ]
    return [
        *q,
        ParamSpec("kv_a", "linear", (a.rank + a.rope, hidden), dtype, bias=x.bias),
        ParamSpec("kv_a_norm", "norm", (a.rank,), dtype),
        ParamSpec("kv_b", "latent_up", (a.heads, a.nope + a.v, a.rank), dtype, shard_axis=0),
        *(_index_specs(x.index, x.q_rank, hidden, dtype) if x.index and x.q_rank else ()),
    ]


def _index_specs(s: IndexSpec, q_rank: int, hidden: int, dtype: DType) -> list[ParamSpec]:
    return [
        ParamSpec("index_q", "linear", (s.heads * s.dim, q_rank), dtype),
        ParamSpec("index_k", "linear", (s.dim, hidden), dtype),
        ParamSpec("index_norm", "norm", (s.dim,), dtype, bias=True),
        ParamSpec("index_weights", "linear", (s.heads, hidden), dtype),
    ]


def row_order(x: Latent, name: str) -> HostArray | None:
    """Which rows of a checkpoint make up a parameter: the verbs turn column i with column i + rope/2. None: all as
    they are. Scores do not see the order, as q and k have the same."""
    a = x.attention
    if not x.interleaved or name not in ("q", "q_b", "kv_a"):
        return None
    plain, heads = (a.rank, 1) if name == "kv_a" else (a.nope, a.heads)
    pairs = plain + np.arange(a.rope).reshape(-1, 2).T.ravel()
    one = np.concatenate([np.arange(plain), pairs])
    order: HostArray = (np.arange(heads)[:, None] * len(one) + one).ravel()
    return order


def attend(ops: Ops, x: Array, table: Weight, w: dict[str, Weight], kv: KV, m: Meta, s: Latent) -> tuple[Array, KV]:
    a, weights = s.attention, LatentWeights(w["kv_a_norm"], w["kv_b"], table)
    c = ops.linear(x, w["kv_a"])
    if s.q_rank is None:
        return ops.attend_latent(ops.linear(x, w["q"]), c, kv, m, weights, a)
    low = ops.rms_norm(ops.linear(x, w["q_a"]), w["q_a_norm"], a.eps)
    q = ops.linear(low, w["q_b"])
    if s.index is None:
        return ops.attend_latent(q, c, kv, m, weights, a)
    k, each = ops.linear(x, w["index_k"]), ops.linear(x, w["index_weights"])
    index = Index(ops.linear(low, w["index_q"]), k, each, w["index_norm"])
    return ops.attend_sparse(q, c, index, kv, m, weights, a, s.index)
