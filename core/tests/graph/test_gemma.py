"""Configs of Gemma in the hub's spelling and in transformers 5's, and what is made of weights when they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from polyradix.backend.numpy.ops import Packed
from polyradix.backend.registry import open_backend
from polyradix.graph.checkpoint import Checkpoint, load_params
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.errors import ModelError
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ModelSpec

SIZES: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}


def gemma(number: int, **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({"architectures": [f"Gemma{number}ForCausalLM"], **SIZES, **changes})


def test_what_a_config_leaves_out() -> None:
    second, third = gemma(2), gemma(3, head_dim=None)
    assert (second.softcap, second.logits_softcap, second.qk_norm, second.local_rope) == (50.0, 30.0, False, None)
    assert (third.softcap, third.logits_softcap, third.qk_norm, third.heads.dim) == (None, None, True, 256)
    assert (second.window, sorted(second.windowed)) == (64, [0, 2, 4, 6])
    assert (third.window, sorted(third.windowed)) == (64, [0, 1, 2, 3, 4, 6])
    assert (third.rope, third.local_rope) == (Rope(1e6), Rope(1e4))
    assert (second.attn_scale, second.tie_embeddings) == (1 / 16, True)
    assert second.needs("bfloat16").features == {"window", "softcap", "gelu_tanh"}
    assert third.needs("bfloat16").features == {"window", "qk_norm", "gelu_tanh"}


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ],
)
def test_both_spellings_of_ropes(given: dict[str, Any]) -> None:
    got = gemma(3, **given)
    assert (got.rope, got.local_rope) == (Rope(5e5, "linear", 8.0), Rope(100.0))


def test_a_pattern_and_caps_of_its_own() -> None:
    got = gemma(2, sliding_window_pattern=3, attn_logit_softcapping=None, final_logit_softcapping=9)
    assert (sorted(got.windowed), got.softcap, got.logits_softcap) == ([0, 1, 3, 4, 6], None, 9.0)
    assert gemma(2, sliding_window=None).windowed == frozenset()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; expected 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; expected false"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0; expected a number above 0"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1; expected a number above 0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0; expected an integer >= 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "factor is missing; expected a number"),
        ({"rope_parameters": {"full_attention": 1}}, "rope_parameters.full_attention is 1; expected an object"),
    ],
)
def test_mistakes_name_the_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gemma(3, **given)


def test_norms_gain_one_in_float32_and_embeddings_are_scaled_in_the_dtype() -> None:
    spec = gemma(2, num_hidden_layers=1)
    shapes, rng = tensor_shapes(spec), np.random.default_rng(0)
    held = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    checkpoint = Checkpoint("test", {}, shapes.keys(), held.__getitem__, lambda name: "test")
    params = load_params(checkpoint, spec, "bfloat16", open_backend("numpy"), progress=False)
    norm: Packed = params.layers[0]["mlp_post_norm"]
    name = "model.layers.0.post_feedforward_layernorm.weight"
    np.testing.assert_array_equal(norm.value, 1 + held[name])
    embedding = rounded(held["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params.top["embed"].value, rounded(embedding * rounded(20**0.5)))
    np.testing.assert_array_equal(params.top["logits"].value, embedding)


def rounded(x: Any) -> Any:
    import ml_dtypes

    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
