"""Mistral's own format, params.json and consolidated*.safetensors, of models with latent attention (Mistral Large 3).

Source of names and fields: vLLM's transformers_utils/configs/mistral.py and models/mistral_large_3.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polyradix.graph.errors import ModelError

PARAMS = "params.json"
_LEFT_OUT = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
_FIELDS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "activation": "hidden_act",
    "tied_embeddings": "tie_word_embeddings",
    "dtype": "dtype",
    "quantization": "quantization_config",
}
_MOE = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "route_every_n": "moe_layer_freq",
    "routed_scale": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate",
}
_FEED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def hf_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a params.json. Raises ModelError for a model without latent attention."""
    if not params.get("qk_nope_head_dim"):
        raise ModelError(f"{PARAMS}: qk_nope_head_dim is missing; expected latent attention, or a config.json")
    out = {"architectures": ["MistralLarge3ForCausalLM"], "norm_topk_prob": True, "scoring_func": "softmax"}
    out |= _renamed(params, _FIELDS) | _renamed(params.get("moe") or {}, _MOE)
    out["max_position_embeddings"] = params.get("max_position_embeddings") or params.get("max_seq_len") or 128000
    rope: dict[str, Any] = {"rope_theta": params.get("rope_theta"), "rope_type": "default"}
    if yarn := params.get("yarn"):
        rope |= {"rope_type": "yarn", **_renamed(yarn, _YARN)}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0} if yarn.get("apply_scale", True) else {"attention_factor": 1.0}
    if (params.get("quantization") or {}).get("qformat_weight") == "fp8_e4m3":
        out["quantization_config"] = {"quant_method": "fp8"}
    if llama4 := params.get("llama_4_scaling"):
        rope["llama_4_scaling_beta"] = llama4.get("beta")
        rope["original_max_position_embeddings"] = llama4.get("original_max_position_embeddings")
    return out | {"rope_parameters": rope}


def hf_name(name: str) -> str | None:
    """layers.3.attention.wo.weight -> model.layers.3.self_attn.o_proj.weight; None for a part that makes no text.
    A name that is not Mistral's stays."""
    if name.startswith(_LEFT_OUT):
        return None
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", stem):
        part = _LAYER.get(match[2]) or _feed_forward(match[2])
        return f"model.layers.{match[1]}.{part}.{kind}" if part else name
    return name


def _feed_forward(part: str) -> str | None:
    match = re.fullmatch(r"(feed_forward|(?:shared_)?experts)((?:\.\d+)?)\.(w[123])", part)
    if match is None:
        return None
    block = "mlp" if match[1] == "feed_forward" else f"mlp.{match[1]}{match[2]}"
    return f"{block}.{_FEED[match[3]]}"


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {new: values[old] for old, new in names.items() if values.get(old) is not None}
