"""Models with experts: configs, parameters, and every spelling of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polyradix.backend.capabilities import FEATURES, Capabilities, validate
from polyradix.backend.protocol import Memory, MoeSpec
from polyradix.graph.checkpoint import load_params, open_checkpoint
from polyradix.graph.dense import param_specs, tensor_shapes
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.moe import Experts
from polyradix.graph.spec import ModelSpec

COMMON: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "torch_dtype": "float32",
}
MIXTRAL = {**COMMON, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
QWEN = {**COMMON, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 6}
SPELLED = {  # block, gate, up, down
    "mixtral": (MIXTRAL, "block_sparse_moe", "w1", "w3", "w2"),
    "qwen": (QWEN, "mlp", "gate_proj", "up_proj", "down_proj"),
}


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**config, **changes})


def test_configs() -> None:
    assert spec(MIXTRAL).experts == Experts(MoeSpec(4, 2), 6)
    assert spec(QWEN).experts == Experts(MoeSpec(4, 2, renormalise=False), 6)
    assert spec(QWEN, norm_topk_prob=True).experts == Experts(MoeSpec(4, 2), 6)
    assert spec({**QWEN, "num_experts": None}, num_local_experts=4) == spec(QWEN)
    assert (spec(QWEN).qk_norm, spec(QWEN).heads.dim, spec(MIXTRAL).qk_norm) == (True, 4, False)
    assert spec(MIXTRAL, sliding_window=5).window == 5
    assert spec(QWEN, sliding_window=5).window is None
    assert spec(QWEN, sliding_window=5, use_sliding_window=True).window == 5


@pytest.mark.parametrize(
    ("given", "dense"),
    [
        ({}, set()),
        ({"mlp_only_layers": [1, 3]}, {1, 3}),
        ({"decoder_sparse_step": 2}, {0, 2}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {0, 2, 3}),
    ],
)
def test_dense_layers(given: dict[str, Any], dense: set[int]) -> None:
    got = spec(QWEN, num_hidden_layers=4, **given)
    assert got.experts is not None
    assert got.experts.dense_layers == dense
    table = param_specs(got, "float32")
    assert {i for i, layer in enumerate(table.layers) if "gate_up" in {p.name for p in layer}} == dense
    assert spec(QWEN, mlp_only_layers=[0, 1]).experts is None


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (MIXTRAL, {"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; expected at most num_local_experts \(4\)"),
        (QWEN, {"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; expected at most num_experts \(4\)"),
        (QWEN, {"num_experts_per_tok": None}, "num_experts_per_tok is missing; expected an integer"),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts is 0; expected an integer >= 1"),
        (QWEN, {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        (QWEN, {"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        (QWEN, {"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]; expected a list of layers, 0 to 1"),
        (QWEN, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN, {"mlp_bias": True}, "mlp_bias is True; expected false: experts have none"),
    ],
)
def test_mistakes_name_the_field(config: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec(config, **change)


def test_parameters_and_what_they_need() -> None:
    table = param_specs(spec(QWEN), "bfloat16")
    assert [(p.name, p.kind, p.shape, p.dtype, p.shard_axis) for p in table.layers[1]][-4:-1] == [
        ("router", "router", (4, 8), "float32", None),
        ("experts_gate_up", "experts", (4, 12, 8), "bfloat16", 0),
        ("experts_down", "experts", (4, 8, 6), "bfloat16", 0),
    ]
    whole, half = table.bytes(1), table.bytes(2)
    assert whole - half == 2 * (4 * 12 * 8 + 4 * 8 * 6 + 24 * 8 + 8 * 8) + 10 * 8  # halves of bfloat16, two layers
    needs = spec(QWEN).needs("float32")
    assert needs.features == {"moe", "qk_norm"}
    caps = Capabilities("x", "x", frozenset({"float32"}), (16,), 64, features=FEATURES - {"moe"})
    assert [reason.need for reason in validate(needs, caps)] == ["feature moe"]


def test_experts_are_what_ranks_share() -> None:
    four = {"num_key_value_heads": 2, "num_attention_heads": 2}
    assert spec(QWEN, **four).uneven_split(2) is None
    said = "tp is 2; expected a divisor of the model's"
    assert spec(QWEN, **four, num_experts=3).uneven_split(2) == f"{said} num_experts (3)"
    assert spec(QWEN, **four, intermediate_size=5).uneven_split(2) is None
    mixed = spec(QWEN, **four, intermediate_size=5, mlp_only_layers=[0])
    assert mixed.uneven_split(2) == f"{said} intermediate_size (5)"


def tensors(config: dict[str, Any]) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {n: random.normal(size=s).astype(np.float32) for n, s in tensor_shapes(spec(config)).items()}


def stacked(family: str) -> dict[str, Any]:
    """As transformers holds them: model.layers.N.mlp.{gate, experts.gate_up_proj, experts.down_proj}."""
    config, block, gate, up, down = SPELLED[family]
    out = tensors(config)
    for here in ("model.layers.0.", "model.layers.1."):
        parts = [[out.pop(f"{here}{block}.experts.{e}.{part}.weight") for e in range(4)] for part in (gate, up, down)]
        out[f"{here}mlp.gate.weight"] = out.pop(f"{here}{block}.gate.weight")
        out[f"{here}mlp.experts.gate_up_proj"] = np.concatenate([np.stack(parts[0]), np.stack(parts[1])], axis=1)
        out[f"{here}mlp.experts.down_proj"] = np.stack(parts[2])
    return out


def write(folder: Path, config: dict[str, Any], values: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(values, folder / "model.safetensors")
    return str(folder)


def load(path: str, **options: Any) -> Any:
    backend: Any = SimpleNamespace(
        memory=lambda: Memory(1 << 40, 1 << 40),
        collectives=SimpleNamespace(size=1),
        caps=SimpleNamespace(features=frozenset()),
        pack=lambda spec, read: read(),
    )
    checkpoint = open_checkpoint(path, **options)
    return load_params(checkpoint, spec(checkpoint.config), "float32", backend, progress=False)


@pytest.mark.parametrize("family", SPELLED)
def test_both_spellings_of_a_checkpoint(family: str, tmp_path: Path) -> None:
    config, block, gate, up, down = SPELLED[family]
    t = tensors(config)
    each = load(write(tmp_path / "each", config, t))
    whole = load(write(tmp_path / "stacked", config, stacked(family)))
    here = f"model.layers.1.{block}"
    for got in (each.layers[1], whole.layers[1]):
        np.testing.assert_array_equal(got["router"], t[f"{here}.gate.weight"])
        for e in range(4):
            np.testing.assert_array_equal(got["experts_gate_up"][e, :6], t[f"{here}.experts.{e}.{gate}.weight"])
            np.testing.assert_array_equal(got["experts_gate_up"][e, 6:], t[f"{here}.experts.{e}.{up}.weight"])
            np.testing.assert_array_equal(got["experts_down"][e], t[f"{here}.experts.{e}.{down}.weight"])


def test_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    layer = load(str(tmp_path), load_format="dummy").layers[0]
    assert (layer["experts_gate_up"].shape, layer["experts_down"].shape) == ((4, 12, 8), (4, 8, 6))
    assert layer["experts_down"].std() > 0.01


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    t = tensors(MIXTRAL)
    del t["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.1.block_sparse_moe.experts.3.w2.weight \(1 "):
        load(write(tmp_path / "x", MIXTRAL, t))


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    t = {**tensors(QWEN), name: np.zeros((6, 8), np.float32)}
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place in Qwen3MoeForCausalLM"):
        load(write(tmp_path / "x", QWEN, t))


def test_a_stacked_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    t = stacked("qwen")
    name = "model.layers.0.mlp.experts.down_proj"
    t[name] = np.zeros((3, 8, 6), np.float32)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3, 8, 6\]; expected \[4, 8, 6\]"):
        load(write(tmp_path / "x", QWEN, t))


def test_a_missing_stacked_tensor_is_an_error(tmp_path: Path) -> None:
    t = stacked("qwen")
    del t["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.1.mlp.experts.0.down_proj.weight \(4 missing"):
        load(write(tmp_path / "x", QWEN, t))
