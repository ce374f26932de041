"""Every field of every family's config with every kind of mistake: an error that names a field, or a possible model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from polyradix.graph.dense import tensor_shapes
from polyradix.graph.errors import ModelError
from polyradix.graph.rope import rope_table
from polyradix.graph.spec import ModelSpec

Config = dict[str, Any]
BASE: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": [2],
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
ORIGINAL = {"original_max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
TYPES = ["sliding_attention", "full_attention"]
DEEPSEEK: Config = {
    **EXPERTS,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
    "rope_scaling": {**YARN, **ORIGINAL, "mscale": 0.7, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.1},
}
WEIGHTS = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
FAMILIES: dict[str, tuple[str, Config]] = {
    "llama": ("Llama", {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, **ORIGINAL}, "mlp_bias": True}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 1.0}),
    "mistral": ("Mistral", {"sliding_window": 32, "rope_parameters": {**YARN, "attention_factor": 1.1}}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 32, "layer_types": TYPES}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 8, "mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "sliding_window": 32}),
    "gemma3": (
        "Gemma3",
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 32,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "rope_local_base_freq": 1e4,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}, "sliding_attention": {}},
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.7,
            "rope_scaling": {**YARN, **ORIGINAL},
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**DEEPSEEK, "topk_method": "group_limited_greedy", "scoring_func": "softmax"}),
    "deepseek-v3.2": ("DeepseekV32", {**DEEPSEEK, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}),
    "fp8": ("Llama", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}}),
    "awq": (
        "Llama",
        {
            "quantization_config": {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 32,
                "version": "gemm",
                "zero_point": True,
            }
        },
    ),
    "packed": (
        "Llama",
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": WEIGHTS}},
            }
        },
    ),
}
GONE = object()
VALUES: list[Any] = [GONE, None, "x", -1, 0, 2**31 - 1, 10**40, float("nan"), float("inf"), -0.5, True, [], [None], {}]


def places(config: Config, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from places(value, (*before, name))


def changed(config: Config, place: tuple[str, ...], value: Any) -> Config:
    out = inner = copy.deepcopy(config)
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    if value is GONE:
        del inner[place[-1]]
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_mistakes(family: str) -> None:
    name, more = FAMILIES[family]
    config = {**BASE, **more, "architectures": [f"{name}ForCausalLM"]}
    can_be(ModelSpec.from_hf_config(config))
    known = {name for place in places(config) for name in place}
    refused = 0
    for place in places(config):
        for value in VALUES:
            got = read(changed(config, place, value))
            if isinstance(got, ModelSpec):
                can_be(got)
            else:
                refused += 1
                said = re.fullmatch(r"model config: ([\w.]+) .*; expected .*", got)
                assert said, (place, value, got)
                assert known.intersection(said[1].split(".")), (place, value, got)
    assert refused > 100


def read(config: Config) -> ModelSpec | str:
    try:
        return ModelSpec.from_hf_config(config)
    except ModelError as error:
        return str(error)


def can_be(spec: ModelSpec) -> None:
    assert all(size > 0 for shape in tensor_shapes(spec).values() for size in shape)
    dim = spec.latent.attention.rope if spec.latent else spec.heads.dim
    for rope in filter(None, (spec.rope, spec.local_rope)):
        assert np.isfinite(rope_table(rope, 4, dim)).all()
