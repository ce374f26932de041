"""gpt-oss: what its config says beyond a Llama's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from polyradix.backend.protocol import MoeSpec
from polyradix.graph.config import MANY, Config
from polyradix.graph.moe import Experts

if TYPE_CHECKING:
    from polyradix.graph.spec import ModelSpec

ARCHITECTURE = "GptOssForCausalLM"
HEAD_DIM = 64  # where a config does not say, as is the next
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def gpt_oss(spec: ModelSpec, c: Config) -> ModelSpec:
    """`spec` as a Llama's config would give it, made a gpt-oss's."""
    bias, count, top_k = (
        c.get("attention_bias", bool, True),
        c.count("num_local_experts", most=MANY),
        c.count("num_experts_per_tok"),
    )
    if top_k > count:
        raise c.wrong("num_experts_per_tok", f"at most num_local_experts ({count})")
    limit, alpha = c.positive("swiglu_limit", 7.0), c.positive("swiglu_alpha", 1.702)
    routing = MoeSpec(count, top_k, bias="logits", limit=limit, alpha=alpha)
    experts = Experts(routing, spec.intermediate, bias=True, biased=True)
    return replace(spec, sinks=True, qkv_bias=bias, o_bias=bias, experts=experts)
