"""gpt-oss: its config, and its experts as published in MXFP4 against values worked out here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polyradix.backend.numpy.ops import Packed
from polyradix.backend.registry import open_backend
from polyradix.graph.checkpoint import load_params, open_checkpoint
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.spec import ModelSpec

E, H, F = 3, 64, 32
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 4096,
    "sliding_window": 128,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 128,
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**CONFIG, **changes})


def test_config() -> None:
    got = spec(head_dim=None)
    assert (got.heads.dim, got.sinks, got.qkv_bias, got.o_bias) == (64, True, True, True)
    assert (got.window, sorted(got.windowed), got.rope.truncate, got.rope.theta) == (128, [0], False, 150000.0)
    assert got.experts is not None
    routing = got.experts.routing
    assert (routing.bias, routing.renormalise, routing.limit, routing.alpha) == ("logits", True, 7.0, 1.702)
    wanted = {"bias", "window", "sinks", "moe", "moe_bias", "moe_clamp"}
    assert got.needs("bfloat16").features == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_experts_per_tok": 4}, r"num_experts_per_tok is 4; expected at most num_local_experts \(3\)"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0; expected a number above 0"),
        ({"num_local_experts": None}, "num_local_experts is missing; expected an integer"),
    ],
)
def test_mistakes_name_the_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        spec(**given)


def tensors() -> dict[str, np.ndarray]:
    """A checkpoint as it is published."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16)

    out = {"model.embed_tokens.weight": normal(40, H), "lm_head.weight": normal(40, H), "model.norm.weight": normal(H)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name, rows, width in (("q", 64, H), ("k", 32, H), ("v", 32, H), ("o", H, 64)):
            out[f"{layer}self_attn.{name}_proj.weight"] = normal(rows, width)
            out[f"{layer}self_attn.{name}_proj.bias"] = normal(rows)
        out[f"{layer}self_attn.sinks"] = normal(4)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}{name}.weight"] = normal(H)
        out[f"{layer}mlp.router.weight"], out[f"{layer}mlp.router.bias"] = normal(E, H), normal(E)
        for name, rows, width in (("gate_up_proj", 2 * F, H), ("down_proj", H, F)):
            stem = f"{layer}mlp.experts.{name}"
            out[f"{stem}_blocks"] = rng.integers(0, 256, (E, rows, width // 32, 16)).astype(np.uint8)
            out[f"{stem}_scales"] = rng.integers(118, 132, (E, rows, width // 32)).astype(np.uint8)
            out[f"{stem}_bias"] = normal(E, rows)
    return out


def save(folder: Path, held: dict[str, np.ndarray]) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(held, folder / "model.safetensors")
    return str(folder)


def value(blocks: Any, scales: Any, column: int) -> float:
    """Of one row, by the format: a sign, two bits of exponent, one of mantissa."""
    byte = int(blocks[column // 32, column % 32 // 2])
    code = byte >> 4 if column % 2 else byte & 15
    exponent, mantissa = code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return float((-1) ** (code >> 3) * size * 2.0 ** (int(scales[column // 32]) - 127))


def test_experts_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = tensors()
    checkpoint = open_checkpoint(save(tmp_path, held))
    with caplog.at_level(logging.INFO):
        params = load_params(checkpoint, spec(), "bfloat16", open_backend("numpy"), progress=False)
    gate_up, down, sinks = (params.layers[1][name] for name in ("experts_gate_up", "experts_down", "sinks"))
    stem = "model.layers.1.mlp.experts."
    for e, row, column in ((0, 0, 0), (1, 5, 33), (2, F - 1, H - 1)):
        for part, place in ((0, 2 * row), (1, 2 * row + 1)):
            blocks, scales = (held[f"{stem}gate_up_proj_{kind}"][e, place] for kind in ("blocks", "scales"))
            assert gate_up.value[e, part * F + row, column] == value(blocks, scales, column)
            assert gate_up.bias[e, part * F + row] == held[f"{stem}gate_up_proj_bias"][e, place].astype(np.float32)
        blocks, scales = (held[f"{stem}down_proj_{kind}"][e, row] for kind in ("blocks", "scales"))
        assert down.value[e, row, column % F] == value(blocks, scales, column % F)
    np.testing.assert_array_equal(down.bias, held[f"{stem}down_proj_bias"].astype(np.float32))
    held_sinks: Packed = sinks
    np.testing.assert_array_equal(held_sinks.value, held["model.layers.1.self_attn.sinks"].astype(np.float32))
    size = 2 * E * 3 * F * H
    assert (
        f"18 weights in MXFP4, {size * 17 // 32:,} bytes, are dequantised to bfloat16, {2 * size:,} bytes"
        in caplog.text
    )


def test_dummy_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_checkpoint(str(tmp_path), load_format="dummy")
    layer = load_params(checkpoint, spec(), "bfloat16", open_backend("numpy"), progress=False).layers[0]
    assert layer["sinks"].value.shape == (4,)
    assert 0 < np.abs(layer["sinks"].value).max() < 0.2


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("gate_up_proj_scales", (E, 2 * F, 1), r"gate_up_proj_scales has shape \[3, 64, 1\]; expected \[3, 64, 2\]"),
        ("down_proj_blocks", (E, H, 1, 8), r"down_proj_blocks has shape \[3, 64, 1, 8\]; expected \[3, 64, 1, 16\]"),
        ("down_proj_bias", None, "no tensor .*down_proj.bias; the config promises it"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, shape: tuple[int, ...] | None, said: str) -> None:
    held = tensors()
    for i in range(2):
        whole = held.pop(f"model.layers.{i}.mlp.experts.{name}")
        if shape is not None:
            held[f"model.layers.{i}.mlp.experts.{name}"] = np.zeros(shape, whole.dtype)
    checkpoint = open_checkpoint(save(tmp_path, held))
    with pytest.raises(CheckpointError, match=said):
        load_params(checkpoint, spec(), "bfloat16", open_backend("numpy"), progress=False)
