"""Configs in every spelling, and every mistake with the field's name in the message."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from polyradix.backend.protocol import Heads, KVSpec
from polyradix.graph.errors import ModelError
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ARCHITECTURES, ModelSpec
from polyradix.graph.windows import layer_groups

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SCALED = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 128)


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**LLAMA, **changes})


def family(name: str, **changes: Any) -> ModelSpec:
    return spec(architectures=[f"{name}ForCausalLM"], **changes)


def test_defaults() -> None:
    got = spec()
    assert got == ModelSpec("LlamaForCausalLM", 2, 64, 96, Heads(4, 4, 16), 100, 512, 1e-6, Rope(10000.0))
    assert got.kv_spec(16, "float32") == KVSpec(2, 4, 16, 16, "float32")
    assert got.needs("bfloat16").features == frozenset()


def test_null_counts_as_absent() -> None:
    assert spec(head_dim=None, rope_scaling=None, num_key_value_heads=None) == spec()
    assert spec(head_dim=32).heads == Heads(4, 4, 32)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 500000}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5e5, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, Rope(5e5, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, SCALED),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, SCALED),
    ],
)
def test_both_spellings_of_rope(given: dict[str, Any], want: Rope) -> None:
    assert spec(**given).rope == want


def test_biases_and_norms() -> None:
    assert (family("Qwen2").qkv_bias, family("Qwen2").o_bias, family("Qwen2").mlp_bias) == (True, False, False)
    biased = spec(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert (family("Qwen3").qk_norm, family("Qwen3").heads.dim, spec().qk_norm) == (True, 128, False)
    assert family("Qwen2").needs("float32").features == {"bias"}
    assert family("Qwen3").needs("float32").features == {"qk_norm"}


SWITCHED = {"sliding_window": 32, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("name", "given", "want"),
    [
        ("Mistral", {"sliding_window": 32}, {0, 1}),
        ("Mistral", {"sliding_window": None}, {}),
        ("Llama", {"sliding_window": 32}, {}),
        ("Qwen2", {**SWITCHED, "use_sliding_window": False, "max_window_layers": 0}, {}),
        ("Qwen2", {**SWITCHED, "max_window_layers": 0}, {0, 1}),
        ("Qwen2", {**SWITCHED, "max_window_layers": 1}, {1}),
        ("Qwen2", {**SWITCHED, "max_window_layers": 2}, {}),
        ("Qwen3", {**SWITCHED, "layer_types": ["sliding_attention"] * 2, "max_window_layers": 2}, {0, 1}),
        ("Qwen3", {**SWITCHED, "layer_types": ["sliding_attention", "full_attention"]}, {0}),
    ],
)
def test_windows(name: str, given: dict[str, Any], want: Collection[int]) -> None:
    got = family(name, **given)
    assert (got.window, got.windowed) == (32 if want else None, frozenset(want))
    assert ("window" in got.needs("float32").features) == bool(want)


@pytest.mark.parametrize(
    ("layers", "full", "want"),
    [
        (3, {1}, ((1,), (0,), (2,))),
        (4, {1, 3}, ((1, 3), (0, 2))),
        (7, {6}, ((6,), *((i,) for i in range(6)))),
        (18, {5, 11, 17}, ((5, 11, 17), (0, 1, 2), (3, 4, 6), (7, 8, 9), (10, 12, 13), (14, 15, 16))),
        (4, set(), ()),
        (4, {0, 1, 2, 3}, ()),
    ],
)
def test_layers_of_one_kind_form_groups(layers: int, full: set[int], want: Collection[tuple[int, ...]]) -> None:
    assert layer_groups(layers, frozenset(range(layers)) - full) == want


def test_groups_cost_few_layers() -> None:
    """34 layers, 5 of them full: 6 groups of 5 for the others cost one layer more, and groups of one would be 34."""
    assert [len(group) for group in layer_groups(34, frozenset(i for i in range(34) if (i + 1) % 6))] == [5] * 6 + [4]


def test_eos_ids_are_joined() -> None:
    assert ModelSpec.from_hf_config({**LLAMA, "eos_token_id": 2}, {"eos_token_id": [7, 2]}).eos_ids == (2, 7)
    assert ModelSpec.from_hf_config({**LLAMA, "eos_token_id": None}, {}).eos_ids == ()


@pytest.mark.parametrize(
    ("given", "want"), [({}, "bfloat16"), ({"torch_dtype": "float16"}, "bfloat16"), ({"dtype": "float32"}, "float32")]
)
def test_dtype(given: dict[str, Any], want: str) -> None:
    assert spec(**given).dtype == want


@pytest.mark.parametrize("field", [name for name in LLAMA if name != "architectures"])
@pytest.mark.parametrize("value", [None, 0, -3, 1.5, "8", True, [1]])
def test_numbers_must_be_counts(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"{field} is .*; expected an integer"):
        spec(**{field: value})


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", ["GPT2LMHeadModel"], ["LlamaForCausalLM"] * 2])
def test_unknown_architectures_list_the_known(value: object) -> None:
    with pytest.raises(ModelError) as error:
        spec(architectures=value)
    assert all(name in str(error.value) for name in (*ARCHITECTURES, repr(value)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; expected a divisor of num_attention_heads \(4\)"),
        ({"head_dim": 15}, "head_dim is 15; expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number above 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; expected a number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected a number between -1e"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4}},
            "rope_type is 'longrope'; expected one of default, dynamic, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.factor is missing; expected a number"),
        (
            {"rope_parameters": {"rope_type": "yarn", "beta_fast": 1}},
            r"rope_parameters.beta_fast is 1; expected a number above beta_slow \(1.0\)",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_scaling.factor is 0; expected a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5; expected a number of at l"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.rope_type is missing; expected one of default, dynamic"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}; expected numbers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; expected a number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; expected an object"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor is 1; expected"),
        ({"rope_parameters": {"freq_factors": [1.0]}}, "freq_factors is .*; expected 8 numbers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method is missing; expected one of awq"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"torch_dtype": "float64"}, "torch_dtype is 'float64'; expected one of float32"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is .*; expected token ids"),
    ],
)
def test_mistakes_name_the_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec(**given)


@pytest.mark.parametrize("types", [["sliding_attention"], ["full_attention", "chunked_attention"], "full", [[], []]])
def test_layer_types_of_another_shape(types: Any) -> None:
    with pytest.raises(ModelError, match=r"layer_types is .*; expected a list of 2, each 'sliding_attention' or"):
        family("Qwen3", **SWITCHED, layer_types=types)
