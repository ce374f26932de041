"""Models with latent attention: configs, parameters, and every spelling of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyradix.backend.capabilities import FEATURES, Capabilities, validate
from polyradix.backend.protocol import IndexSpec, KVSpec, LatentSpec, Memory, MoeSpec
from polyradix.graph.checkpoint import load_params, open_checkpoint
from polyradix.graph.dense import param_specs, tensor_shapes
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.moe import Experts
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ModelSpec

YARN = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 8}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}
V32 = {
    **V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 3,
    "index_head_dim": 6,
    "index_topk": 7,
}
V2 = {**V3, "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax", "norm_topk_prob": False}
LARGE: dict[str, Any] = {  # a params.json
    "dim": 8,
    "n_layers": 2,
    "hidden_dim": 6,
    "n_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": 10,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
    "yarn": {"original_max_position_embeddings": 8, "factor": 4, "apply_scale": False, "beta": 32, "alpha": 1},
    "llama_4_scaling": {"original_max_position_embeddings": 8, "beta": 0.1},
    "moe": {
        "expert_hidden_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "route_every_n": 1,
        "routed_scale": 1.0,
    },
}


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**config, **changes})


def latent(config: dict[str, Any], **changes: Any) -> LatentSpec:
    got = spec(config, **changes).latent
    assert got is not None
    return got.attention


def test_attention() -> None:
    assert latent(V3) == LatentSpec(2, 5, 3, 4, 2, 7**-0.5, 1e-6)
    got = spec(V3)
    assert got.latent is not None
    assert (got.latent.q_rank, got.latent.interleaved, got.latent.bias) == (6, True, False)
    plain = spec(V3, q_lora_rank=None, rope_interleave=False, attention_bias=True).latent
    assert plain is not None
    assert (plain.q_rank, plain.interleaved, plain.bias) == (None, False, True)


def test_scores_are_as_much_larger_as_yarn_says() -> None:
    scaled = spec(V3, rope_scaling=YARN, rope_theta=10000)
    stretch = 0.1 * 0.707 * np.log(40) + 1
    assert latent(V3, rope_scaling=YARN).scale == pytest.approx(7**-0.5 * stretch**2)
    assert scaled.rope == Rope(10000.0, "yarn", 40.0, original_max_position=8, magnitude=1.0)
    new = {"rope_theta": 10000.0, "rope_type": "yarn", **{k: v for k, v in YARN.items() if k != "type"}}
    assert spec(V3, rope_parameters=new) == scaled
    other = spec(V3, rope_scaling={**YARN, "mscale": 1.0}).rope
    assert other.magnitude == pytest.approx((0.1 * np.log(40) + 1) / stretch)


def test_experts() -> None:
    v3 = MoeSpec(8, 2, "sigmoid", True, 2.5, groups=4, top_groups=2, group_best=2)
    assert spec(V3).experts == Experts(v3, 4, frozenset({0}), shared=8, bias=True)
    v2 = MoeSpec(8, 2, "softmax", False, 2.5, groups=4, top_groups=2)
    assert spec(V2, topk_method="group_limited_greedy").experts == Experts(v2, 4, frozenset({0}), shared=8)
    lite = spec(V2, topk_method="greedy", n_shared_experts=None).experts
    assert lite == Experts(MoeSpec(8, 2, "softmax", False, 2.5), 4, frozenset({0}))
    assert spec(V3, first_k_dense_replace=2).experts is None
    some = spec(V3, num_hidden_layers=5, moe_layer_freq=2).experts
    assert some is not None
    assert some.dense_layers == {0, 1, 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing; expected an integer"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; expected an even number"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0; expected an integer >= 1"),
        ({"n_group": 3}, r"n_group is 3; expected a divisor of experts \(8\)"),
        ({"topk_group": 5}, r"topk_group is 5; expected 1 to groups \(4\)"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; expected 1 to the experts kept \(4\)"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu'; expected 'softmax' or 'sigmoid'"),
        ({"topk_method": "best"}, "topk_method is 'best'; expected 'greedy', 'group_limited_greedy' or 'noaux_tc'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'; expected one of default, dynamic"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method is 'aqlm'; expected one of"),
        ({"rope_scaling": {**YARN, "llama_4_scaling_beta": 1.0, "original_max_position_embeddings": None}}, "original"),
    ],
)
def test_mistakes_name_the_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec(V3, **change)


def test_the_cache_parameters_and_needs() -> None:
    got = spec(V3)
    assert got.kv_spec(16, "bfloat16") == KVSpec(2, 1, 9, 16, "bfloat16", "latent")
    table = param_specs(got, "bfloat16")
    assert table.top[1].shape == (32, 4)
    assert [(p.name, p.shape, p.shard_axis) for p in table.layers[1]] == [
        ("q_a", (6, 8), None),
        ("q_a_norm", (6,), None),
        ("q_b", (14, 6), 0),
        ("kv_a", (9, 8), None),
        ("kv_a_norm", (5,), None),
        ("kv_b", (2, 5, 5), 0),
        ("o", (8, 4), 1),
        ("mlp_norm", (8,), None),
        ("router", (8, 8), None),
        ("experts_gate_up", (8, 8, 8), 0),
        ("experts_down", (8, 8, 4), 0),
        ("shared_gate_up", (16, 8), 0),
        ("shared_down", (8, 8), 1),
        ("next_norm", (8,), None),
    ]
    assert got.needs("float32").features == {"mla", "moe"}
    caps = Capabilities("x", "x", frozenset({"float32"}), (16,), 64, features=FEATURES - {"mla"})
    assert [reason.need for reason in validate(got.needs("float32"), caps)] == ["feature mla"]


def test_the_indexer() -> None:
    got = spec({k: v for k, v in V32.items() if k not in ("topk_method", "scoring_func")})
    assert got.latent is not None
    assert got.latent.index == IndexSpec(3, 6, 7, 1e-6)
    assert (got.latent.attention, got.experts) == (latent(V3), spec(V3).experts)
    assert got.kv_spec(16, "bfloat16") == KVSpec(2, 1, 15, 16, "bfloat16", "latent", 6)
    assert got.needs("float32").features == {"indexer", "mla", "moe"}
    own = tensor_shapes(got).items() - tensor_shapes(spec(V3)).items()
    assert {(n.removeprefix("model.layers.1.self_attn.indexer."), s) for n, s in own if ".1." in n} == {
        ("wq_b.weight", (18, 6)),
        ("wk.weight", (6, 8)),
        ("k_norm.weight", (6,)),
        ("k_norm.bias", (6,)),
        ("weights_proj.weight", (3, 8)),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is missing; expected an integer"),
        ({"index_topk": 0}, "index_topk is 0; expected an integer >= 1"),
        ({"index_head_dim": 3}, r"index_head_dim is 3; expected at least qk_rope_head_dim \(4\)"),
    ],
)
def test_mistakes_of_the_indexer_name_the_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec(V32, **change)


def test_heads_and_shared_experts_are_what_ranks_share() -> None:
    assert spec(V3).uneven_split(2) is None
    assert spec(V3).uneven_split(4) == "tp is 4; expected a divisor of the model's num_attention_heads (2)"
    odd = spec(V3, moe_intermediate_size=5, n_shared_experts=1, first_k_dense_replace=0)
    assert (
        odd.uneven_split(2) == "tp is 2; expected a divisor of the model's n_shared_experts * moe_intermediate_size (5)"
    )


def tensors(config: dict[str, Any]) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {n: random.normal(size=s).astype(np.float32) for n, s in tensor_shapes(spec(config)).items()}


def published(values: dict[str, Any]) -> dict[str, Any]:
    return {n.replace("mlp.gate.bias", "mlp.gate.e_score_correction_bias"): v for n, v in values.items()}


def write(folder: Path, values: dict[str, Any], config: dict[str, Any], file: str = "config.json") -> str:
    folder.mkdir()
    (folder / file).write_text(json.dumps(config))
    save_file(values, folder / "consolidated-00001-of-00001.safetensors")
    return str(folder)


def load(path: str) -> Any:
    backend: Any = SimpleNamespace(
        memory=lambda: Memory(1 << 40, 1 << 40),
        collectives=SimpleNamespace(size=1),
        caps=SimpleNamespace(features=frozenset()),
        pack=lambda spec, read: (read(), read("bias") if spec.bias else None),
    )
    checkpoint = open_checkpoint(path)
    return load_params(checkpoint, spec(checkpoint.config), "float32", backend, progress=False)


def test_rope_pairs_are_put_apart(tmp_path: Path) -> None:
    """Published rows are pairs side by side; a parameter has the first of each pair, then the second."""
    t = tensors(V3)
    apart = [0, 2, 1, 3]
    layer = load(write(tmp_path / "x", published(t), V3)).layers[0]
    q = t["model.layers.0.self_attn.q_b_proj.weight"].reshape(2, 7, 6)
    np.testing.assert_array_equal(layer["q_b"][0].reshape(2, 7, 6)[:, :3], q[:, :3])
    np.testing.assert_array_equal(layer["q_b"][0].reshape(2, 7, 6)[:, 3:], q[:, 3:][:, apart])
    kv = t["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(layer["kv_a"][0], np.concatenate([kv[:5], kv[5:][apart]]))
    plain = load(write(tmp_path / "y", published(t), {**V3, "rope_interleave": False})).layers[0]
    np.testing.assert_array_equal(plain["q_b"][0].reshape(2, 7, 6), q)


def test_the_selection_bias_and_draft_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = tensors(V3)
    draft = {"model.layers.2.eh_proj.weight": np.zeros((8, 16), np.float32)}
    layer = load(write(tmp_path / "x", {**published(t), **draft}, V3)).layers[1]
    np.testing.assert_array_equal(layer["router"][1], t["model.layers.1.mlp.gate.bias"])
    assert "1 tensors of draft layers or image encoders are left out" in caplog.text
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.eh_proj.weight has no place in Deepseek"):
        load(write(tmp_path / "y", {**published(t), **draft}, {**V3, "num_nextn_predict_layers": 0}))
    del t["model.layers.1.mlp.gate.bias"]
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.1.mlp.gate.bias; the config promises it"):
        load(write(tmp_path / "z", published(t), V3))


MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate.": "gate.",
    "mlp.shared_experts": "shared_experts",
    "mlp.experts": "experts",
    "mlp.": "feed_forward.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def mistral_name(name: str) -> str:
    for ours, theirs in MISTRAL_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def test_mistrals_own_format(tmp_path: Path) -> None:
    hf = {
        **{
            k: v
            for k, v in V3.items()
            if k not in ("topk_method", "scoring_func", "num_nextn_predict_layers", "n_group")
        },
        "architectures": ["Mistral4ForCausalLM"],
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "attention_factor": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    t = tensors(hf)
    own = {mistral_name(n): v for n, v in t.items()} | {"vision_encoder.ln_pre.weight": np.zeros(3, np.float32)}
    assert {"layers.1.experts.7.w2.weight", "layers.1.gate.weight", "layers.0.feed_forward.w3.weight"} <= own.keys()
    path = write(tmp_path / "own", own, LARGE, "params.json")
    first, second = spec(open_checkpoint(path).config), spec(hf)
    assert (first.latent, first.rope, first.experts) == (second.latent, second.rope, second.experts)
    assert latent(hf).attn_scale == 0.1
    got, want = load(path), load(write(tmp_path / "hf", t, hf))
    for a, b in zip([got.top, *got.layers], [want.top, *want.layers], strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name][0], b[name][0])


def test_mistrals_own_format_of_another_model(tmp_path: Path) -> None:
    dense = {k: v for k, v in LARGE.items() if k != "qk_nope_head_dim"}
    with pytest.raises(ModelError, match=r"params.json: qk_nope_head_dim is missing; expected latent attention"):
        open_checkpoint(write(tmp_path / "x", {"a": np.zeros(1, np.float32)}, dense, "params.json"))


def test_mistrals_own_format_quantised(tmp_path: Path) -> None:
    nothing = {"a": np.zeros(1, np.float32)}
    eight = write(tmp_path / "x", nothing, {**LARGE, "quantization": {"qformat_weight": "fp8_e4m3"}}, "params.json")
    assert open_checkpoint(eight).config["quantization_config"] == {"quant_method": "fp8"}
    four = write(tmp_path / "y", nothing, {**LARGE, "quantization": {"qformat_weight": "int4"}}, "params.json")
    with pytest.raises(ModelError, match=r"quant_method is missing; expected one of"):
        open_checkpoint(four)
