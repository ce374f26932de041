"""Gemma 2 and 3 (text): what their configs say beyond a Llama's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from polyradix.graph.config import Config
from polyradix.graph.rope import Rope, read_rope

if TYPE_CHECKING:
    from polyradix.graph.spec import ModelSpec

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
HEAD_DIM = 256  # where a config does not say
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2's, where a config does not say
_THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}


def gemma(spec: ModelSpec, c: Config) -> ModelSpec:
    """`spec` as a Llama's config would give it, made a Gemma's."""
    if c.get("hidden_activation", str, "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise c.wrong("hidden_activation", "'gelu_pytorch_tanh'")
    if c.get("use_bidirectional_attention", bool, False):
        raise c.wrong("use_bidirectional_attention", "false")
    third = spec.architecture == "Gemma3ForCausalLM"
    return replace(
        spec,
        gate="gelu_tanh",
        qk_norm=third,
        norm_offset=1.0,
        post_norms=True,
        embed_scale=spec.hidden**0.5,
        attn_scale=c.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=_cap(c, "attn_logit_softcapping", third),
        logits_softcap=_cap(c, "final_logit_softcapping", third),
        local_rope=rope(c, "sliding_attention", spec.max_position, spec.heads.dim) if third else None,
        tie_embeddings=c.get("tie_word_embeddings", bool, True),
    )


def _cap(c: Config, name: str, third: bool) -> float | None:
    if name not in c.values:
        return None if third else _CAPS[name]
    return None if c.values[name] is None else c.positive(name)


def rope(c: Config, kind: str, max_position: int, dim: int) -> Rope:
    """Transformers 5 writes one object for each kind of layer. Before, `rope_scaling` was that of full attention."""
    local = kind == "sliding_attention"
    theta = c.positive("rope_local_base_freq" if local else "rope_theta", _THETAS[kind])
    new = c.part("rope_parameters")
    if new.values and not new.values.keys() & _THETAS.keys():
        raise c.wrong("rope_parameters", f"an object for {' and '.join(_THETAS)}")
    r = new.part(kind).values or ({} if local else c.part("rope_scaling").values)
    return read_rope(Config({"rope_theta": theta, "rope_parameters": r}), max_position, dim)
