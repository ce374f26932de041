"""The parameter table against the layout written in the contract, and the rope table against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polyradix.backend.protocol import Heads
from polyradix.graph.dense import param_specs, sources, tensor_shapes
from polyradix.graph.rope import Rope, frequencies, rope_table
from polyradix.graph.spec import ModelSpec

SPEC = ModelSpec("LlamaForCausalLM", 2, 8, 12, Heads(4, 2, 6), 10, 32, 1e-5, Rope())


def test_shapes_segments_and_shards() -> None:
    table = param_specs(SPEC, "bfloat16", max_context=20)
    assert [(p.name, p.kind, p.shape, p.dtype, p.shard_axis) for p in table.top] == [
        ("embed", "embed", (10, 8), "bfloat16", None),
        ("rope", "rope", (20, 6), "float32", None),
        ("first_norm", "norm", (8,), "bfloat16", None),
        ("logits", "logits", (10, 8), "bfloat16", 0),
    ]
    assert [(p.name, p.kind, p.shape, p.segments, p.shard_axis) for p in table.layers[1]] == [
        ("qkv", "linear", (48, 8), (24, 12, 12), 0),
        ("o", "linear_reduce", (8, 24), (), 1),
        ("mlp_norm", "norm", (8,), (), None),
        ("gate_up", "linear", (24, 8), (12, 12), 0),
        ("down", "linear_reduce", (8, 12), (), 1),
        ("next_norm", "norm", (8,), (), None),
    ]
    assert param_specs(SPEC, "float32").top[1].shape == (32, 6)
    assert param_specs(SPEC, "float32", max_context=99).top[1].shape == (32, 6)


@pytest.mark.parametrize("tied", [False, True])
def test_every_checkpoint_tensor_once(tied: bool) -> None:
    spec = ModelSpec(**{**vars(SPEC), "qk_norm": True, "qkv_bias": True, "tie_embeddings": tied})
    layer = {
        "input_layernorm.weight": (8,),
        "self_attn.q_proj.weight": (24, 8),
        "self_attn.q_proj.bias": (24,),
        "self_attn.k_proj.weight": (12, 8),
        "self_attn.k_proj.bias": (12,),
        "self_attn.v_proj.weight": (12, 8),
        "self_attn.v_proj.bias": (12,),
        "self_attn.q_norm.weight": (6,),
        "self_attn.k_norm.weight": (6,),
        "self_attn.o_proj.weight": (8, 24),
        "post_attention_layernorm.weight": (8,),
        "mlp.gate_proj.weight": (12, 8),
        "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12),
    }
    want = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    want |= {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    assert tensor_shapes(spec) == want | ({} if tied else {"lm_head.weight": (10, 8)})


def test_next_norm_belongs_to_the_next_layer() -> None:
    assert sources(SPEC, "next_norm", 0) == ("model.layers.1.input_layernorm",)
    assert sources(SPEC, "next_norm", 1) == ("model.norm",)
    assert sources(SPEC, "first_norm") == ("model.layers.0.input_layernorm",)


def test_rope_table() -> None:
    table = rope_table(Rope(100.0), 50, 4)
    assert (table.shape, table.dtype.name) == ((50, 4), "float32")
    for position in (0, 1, 49):
        angles = [position, position / 10]
        want = [*map(math.cos, angles), *map(math.sin, angles)]
        np.testing.assert_allclose(table[position], want, atol=1e-6)


def test_scaled_frequencies() -> None:
    plain = frequencies(Rope(), 64)
    np.testing.assert_allclose(frequencies(Rope(type="linear", factor=4.0), 64), plain / 4)
    factors = tuple(np.linspace(1, 8, 32))
    np.testing.assert_allclose(frequencies(Rope(freq_factors=factors), 64), plain / factors)
    scaled = frequencies(Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 1024), 64)
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 1024 / 4, wavelength > 1024
    np.testing.assert_allclose(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8)
    between = ~fast & ~slow
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
