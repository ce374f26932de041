"""Rope tables of published configs, in transformers' old and new spelling, against its own rotary embeddings, at
positions far beyond the original context."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from polyradix.graph.rope import Rope, rope_table
from polyradix.graph.spec import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1}
# family, context, theta, scaling, and what else is of interest
PUBLISHED: dict[str, tuple[str, int, float, dict[str, Any], dict[str, Any]]] = {
    "Llama 3": ("Llama", 8192, 5e5, {}, {}),
    "Llama 3.1": (
        "Llama",
        131072,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {},
    ),
    "Llama 3.2": (
        "Llama",
        131072,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {},
    ),
    "linear": ("Llama", 16384, 1e4, {"rope_type": "linear", "factor": 4.0}, {}),
    "Qwen 2.5": ("Qwen2", 131072, 1e6, {**YARN, "factor": 4.0, "original_max_position_embeddings": 32768}, {}),
    "Qwen 3": (
        "Qwen3",
        40960,
        1e6,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {},
    ),
    "gpt-oss": (
        "GptOss",
        131072,
        150000.0,
        {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        163840,
        1e4,
        {
            **YARN,
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        LATENT,
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        163840,
        1e4,
        {**YARN, "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
        LATENT,
    ),
    "Gemma 2": ("Gemma2", 8192, 1e4, {}, {}),
    "Gemma 3": (
        "Gemma3",
        131072,
        1e6,
        {"rope_type": "linear", "factor": 8.0},
        {"rope_local_base_freq": 1e4, "num_hidden_layers": 6},
    ),
}


def rotary(family: str) -> Any:
    """The class of a family's rotary embedding."""
    module = __import__(f"transformers.models.{SNAKE[family]}.modeling_{SNAKE[family]}", fromlist=["x"])
    return getattr(module, f"{family}RotaryEmbedding")


SNAKE = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "GptOss": "gpt_oss", "DeepseekV2": "deepseek_v2"}
SNAKE |= {"DeepseekV3": "deepseek_v3", "Gemma2": "gemma2", "Gemma3": "gemma3"}


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published(model: str, spelling: str) -> None:
    family, context, theta, scaling, more = PUBLISHED[model]
    kind = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    old = {**SIZES, **more, "max_position_embeddings": context, "rope_theta": theta}
    config = kind.from_dict(copy.deepcopy({**old, "rope_scaling": scaling or None}))
    given = {**old, "rope_scaling": scaling or None} if spelling == "old" else config.to_dict()
    if spelling == "new":
        assert "rope_scaling" not in given
        assert "rope_theta" not in given
    spec = ModelSpec.from_hf_config({**given, "architectures": [f"{family}ForCausalLM"]})
    module = rotary(family)(config)
    if family == "Gemma3":
        kinds = {"full_attention": spec.rope, "sliding_attention": spec.local_rope}
        for layers, rope in kinds.items():
            same(rope, context, getattr(module, f"{layers}_inv_freq"), getattr(module, f"{layers}_attention_scaling"))
    else:
        same(spec.rope, context, module.inv_freq, module.attention_scaling)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_dynamic(factor: float) -> None:
    """As transformers has it for the longest sequence: a key in the cache must not change as its sequence grows."""
    context, scaling = 4096, {"rope_type": "dynamic", "factor": factor}
    old = {**SIZES, "max_position_embeddings": context, "rope_theta": 1e4}
    config = transformers.LlamaConfig.from_dict(copy.deepcopy({**old, "rope_scaling": scaling}))
    longest = int(factor * context)
    freq, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=longest)
    for given in ({**old, "rope_scaling": scaling}, config.to_dict()):
        spec = ModelSpec.from_hf_config({**given, "architectures": ["LlamaForCausalLM"]})
        assert spec.max_position == longest
        same(spec.rope, longest, freq, scale)


def same(rope: Rope | None, context: int, inv_freq: Any, scale: float) -> None:
    """Cosines and sines of transformers' frequencies, in float64 as float32's angles are off at such positions."""
    assert rope is not None
    freq = inv_freq.double().numpy()
    at = np.array([1, 100, 4095, 4096, context // 2, context - 1])
    angles = np.outer(at, freq)
    want = np.hstack([np.cos(angles), np.sin(angles)]) * scale
    got = rope_table(rope, context, 2 * len(freq))[at]
    off = at[:, None] * np.tile(freq, 2) * 2**-22 * scale + 1e-6  # an angle is off by what its float32 frequency is
    assert (np.abs(got - want) <= off).all()
