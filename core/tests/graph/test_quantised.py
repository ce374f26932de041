"""Quantised checkpoints, written here code by code as their formats say, then broken one way at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import HOST_DTYPES, HostArray, ParamPart, Params, ParamSpec
from polyradix.backend.shard import shard
from polyradix.graph.checkpoint import load_params, open_checkpoint
from polyradix.graph.checkpoint.keep import keep
from polyradix.graph.dense import param_specs, tensor_shapes
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
EXPERTS = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT = {
    **CONFIG,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
Tensors = dict[str, HostArray]
Writer = Callable[[str, tuple[int, ...]], tuple[Tensors, HostArray]]  # stem, [out, in] -> as stored, and its values
RANDOM = np.random.default_rng(3)


def fp8(scale: str, rows: int | None = None, columns: int | None = None, shape: str = "blocks") -> Writer:
    """A scale for each block of rows x columns, None for all of them."""

    def write(stem: str, size: tuple[int, ...]) -> tuple[Tensors, HostArray]:
        tall, wide = rows or size[0], columns or size[1]
        codes = RANDOM.normal(0, 30, size).astype(ml_dtypes.float8_e4m3fn)
        scales = RANDOM.uniform(0.001, 0.01, (-(-size[0] // tall), -(-size[1] // wide))).astype(np.float32)
        value = codes.astype(np.float64)
        for i, j in np.ndindex(size):
            value[i, j] *= scales[i // tall, j // wide]
        held = scales.reshape({"blocks": scales.shape, "row": (-1,), "scalar": ()}[shape])
        return {f"{stem}.weight": codes, f"{stem}.{scale}": held, f"{stem}.input_scale": np.ones(1, np.float32)}, value

    return write


def packed(nibbles: HostArray, order: tuple[int, ...]) -> HostArray:
    """[rows, n] -> int32 [rows, n / 8]: value order[i] of eight at bit 4 i."""
    out = np.zeros((len(nibbles), nibbles.shape[1] // 8), np.uint32)
    for column in range(out.shape[1]):
        for i, place in enumerate(order):
            out[:, column] |= nibbles[:, 8 * column + place].astype(np.uint32) << np.uint32(4 * i)
    return out.view(np.int32)


def int4(method: str, group: int, stored_zero: int = 0, order: bool = False) -> Writer:
    """Codes [in, out]; `stored_zero` is added to zero points; with `order` columns have groups at random."""

    def write(stem: str, size: tuple[int, ...]) -> tuple[Tensors, HostArray]:
        out, width = size
        groups = width // (group if group > 0 else width)
        codes, zeros = RANDOM.integers(0, 16, (width, out)), RANDOM.integers(0, 16, (groups, out))
        scales = RANDOM.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
        of = np.arange(width) * groups // width
        if order:
            of = RANDOM.permutation(of)
        value = np.zeros(size)
        for i, j in np.ndindex(size):
            value[i, j] = (codes[j, i] - zeros[of[j], i]) * float(scales[of[j], i])
        kept = (zeros + stored_zero) % 16
        if method == "awq":
            by_column = (0, 2, 4, 6, 1, 3, 5, 7)
            parts = {"qweight": packed(codes, by_column), "qzeros": packed(kept, by_column)}
        elif method == "packed":
            points = np.ascontiguousarray(packed(kept, tuple(range(8))).T)
            parts = {"packed": packed(np.ascontiguousarray(codes.T), tuple(range(8))), "zero_point": points}
            parts |= {"g_idx": of.astype(np.int32), "scale": np.ascontiguousarray(scales.T), "shape": np.array(size)}
            return {f"{stem}.weight_{name}": part for name, part in parts.items()}, value
        else:
            plain = tuple(range(8))
            weight = np.ascontiguousarray(packed(np.ascontiguousarray(codes.T), plain).T)
            parts = {"qweight": weight, "qzeros": packed(kept, plain), "g_idx": of.astype(np.int32)}
        return {f"{stem}.{name}": part for name, part in {**parts, "scales": scales}.items()}, value

    return write


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    group = {"weights": weights, "input_activations": {"dynamic": True}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def packed_config(strategy: str, group: int | None) -> dict[str, Any]:
    out = compressed(strategy, type="int", num_bits=4, group_size=group, symmetric=False)
    return {**out, "format": "pack-quantized"}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8-block": (BLOCKS, fp8("weight_scale_inv", 16, 16)),
    "fp8-block-uneven": ({**BLOCKS, "weight_block_size": [128, 20]}, fp8("weight_scale_inv", 128, 20)),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8("weight_scale", shape="scalar")),
    "fp8-mistral": ({"quant_method": "fp8"}, fp8("qscale_weight", shape="scalar")),
    "compressed-tensor": (compressed("tensor"), fp8("weight_scale", shape="row")),
    "compressed-channel": (compressed("channel"), fp8("weight_scale", 1)),
    "compressed-row": (compressed("channel"), fp8("weight_scale", 1, shape="row")),
    "compressed-block": (compressed("block", block_structure=[16, 16]), fp8("weight_scale", 16, 16)),
    "awq": (AWQ, int4("awq", 16)),
    "awq-whole": ({**AWQ, "group_size": -1}, int4("awq", -1)),
    "gptq": (GPTQ, int4("gptq", 16, stored_zero=-1)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, int4("gptq", 16)),
    "packed": (packed_config("group", 16), int4("packed", 16)),
    "packed-channel": (packed_config("channel", None), int4("packed", -1)),
    "packed-order": (packed_config("group", 16), int4("packed", 16, order=True)),
    "gptq-order": ({**GPTQ, "desc_act": True}, int4("gptq", 16, stored_zero=-1, order=True)),
}


class Plain(NumpyBackend):
    """Keeps no weight quantised; `taken` are the specs that it was given."""

    features: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__("float32", False)
        self.taken: list[ParamSpec] = []
        self.caps = replace(self.caps, features=self.features)

    def pack(self, spec: ParamSpec, read: Any) -> Any:
        self.taken.append(spec)
        return super().pack(spec, read)


class Keeping(Plain):
    features = frozenset({"quant_fp8", "quant_int4"})


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make(folder: Path, format: str, config: dict[str, Any] = CONFIG) -> tuple[Path, Tensors, Path]:
    """A quantised folder, what is in it, and one with the same values as plain tensors."""
    quantisation, writer = FORMATS[format]
    stored, plain = Tensors(), Tensors()
    for name, shape in tensor_shapes(ModelSpec.from_hf_config(config)).items():
        if "_proj" in name:
            parts, value = writer(name.removesuffix(".weight"), shape)
            stored |= parts
            plain[name] = value.astype(np.float32)
        else:
            stored[name] = plain[name] = RANDOM.normal(size=shape).astype(np.float32)
    told = {**config, "quantization_config": quantisation}
    return write(folder / "quantised", told, stored), stored, write(folder / "plain", config, plain)


def load(path: Path, backend: NumpyBackend | None = None) -> Params:
    checkpoint = open_checkpoint(str(path))
    spec = ModelSpec.from_hf_config(checkpoint.config)
    return load_params(checkpoint, spec, "float32", backend or Plain(), progress=False)


def close(got: Params, want: Params) -> None:
    for name, w in [*want.top.items(), *want.layers[0].items()]:
        have = (got.top | got.layers[0])[name].value
        np.testing.assert_allclose(have, w.value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_what_the_format_says(tmp_path: Path, format: str) -> None:
    path, _, plain = make(tmp_path, format)
    close(load(path), load(plain))


@pytest.mark.parametrize("format", FORMATS)
def test_a_backend_that_keeps_them_is_given_the_same_values(tmp_path: Path, format: str) -> None:
    path, _, plain = make(tmp_path, format)
    backend = Keeping()
    close(load(path, backend), load(plain))
    kept = {spec.name for spec in backend.taken if spec.quant}
    joined = {"qkv", "gate_up"} if format != "fp8-block-uneven" else set()  # its parts are no whole blocks
    assert kept == (set() if format.endswith("-order") else {"o", "down"} | joined)


@pytest.mark.parametrize(
    ("config", "format", "expected"),
    [
        (EXPERTS, "fp8-block", {"qkv", "o", "experts_gate_up", "experts_down"}),
        (EXPERTS, "awq", {"qkv", "o", "experts_gate_up", "experts_down"}),
        (LATENT, "compressed-channel", {"q_a", "q_b", "kv_a", "o", "gate_up", "down"}),
        (LATENT, "fp8-block", {"q_a", "q_b", "kv_a", "o", "gate_up", "down"}),
        (
            {**LATENT, "qk_nope_head_dim": 12},
            "fp8-block",
            {"q_a", "kv_a", "o", "gate_up", "down"},
        ),  # rows change blocks
        (LATENT, "awq", {"q_a", "q_b", "kv_a", "o", "gate_up", "down"}),
    ],
)
def test_experts_and_latent_attention(tmp_path: Path, config: dict[str, Any], format: str, expected: set[str]) -> None:
    path, _, plain = make(tmp_path, format, config)
    backend = Keeping()
    close(load(path, backend), load(plain))
    assert {spec.name for spec in backend.taken if spec.quant} == expected


class TwoRanks(Keeping):
    """As a backend of two ranks is given its parameters: whole."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Any = SimpleNamespace(size=2)


@pytest.mark.parametrize(
    ("format", "kept", "said"),
    [
        (
            "fp8-block",
            {"qkv", "o", "gate_up"},
            [
                "model.layers.0.self_attn.q_proj: tp is 2 and cuts blocks of 16 of the 32 and 16 rows into 8, "
                "so it has more scales; tp 1 cuts none",
                "model.layers.0.mlp.gate_proj: tp is 2 and cuts blocks of 16 of the 48 rows into 8, "
                "so it has more scales; tp 1 cuts none",
                "model.layers.0.mlp.down_proj: tp is 2 and cuts blocks of 16 of the 48 columns into 8, "
                "too narrow to keep, so it is dequantised; tp 1 cuts none",
            ],
        ),
        ("compressed-channel", {"qkv", "o", "gate_up", "down"}, []),
        (
            "awq",
            {"qkv", "o", "gate_up"},
            [
                "model.layers.0.mlp.down_proj: tp is 2 and cuts blocks of 16 of the 48 columns into 8, "
                "too narrow to keep, so it is dequantised; tp 1 cuts none"
            ],
        ),
        ("awq-whole", {"qkv", "o", "gate_up", "down"}, []),
    ],
)
def test_blocks_that_ranks_cut(
    tmp_path: Path, format: str, kept: set[str], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, _, plain = make(tmp_path, format)
    backend = TwoRanks()
    close(load(path, backend), load(plain))
    assert {spec.name for spec in backend.taken if spec.quant} == kept
    assert caplog.messages == said
    checkpoint = open_checkpoint(str(path))
    spec = ModelSpec.from_hf_config(checkpoint.config)
    table = keep(param_specs(spec, "float32"), checkpoint, spec, Keeping.features, 2)
    assert table.bytes(2) == sum(held_by_a_rank(p) for p in backend.taken)


def held_by_a_rank(p: ParamSpec) -> int:
    """Bytes of the first of two ranks' shards."""
    if p.quant is None:
        return shard(p, np.empty(p.shape, HOST_DTYPES[p.dtype]), 0, 2).nbytes
    (rows, columns), (out, width) = p.quant.block, p.shape
    parts: dict[ParamPart, HostArray] = {
        "weight": np.empty((out, width // 2 if p.quant.format == "int4" else width), np.uint8)
    }
    blocks = -(-out // rows), -(-width // columns)
    parts |= {"scale": np.empty(blocks, np.float32)}
    parts |= {"zero": np.empty(blocks, np.uint8)} if p.quant.format == "int4" else {}
    return sum(shard(p, x, 0, 2, part).nbytes for part, x in parts.items())


def test_the_log_says_what_becomes_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _, _ = make(tmp_path, "awq")
    with caplog.at_level(logging.INFO):
        load(path)
        load(path, Keeping())
    weights = 32 * (32 + 32 + 16 + 16 + 3 * 48)
    size = weights // 2 + weights // 16 * 2 + weights // 16 // 2
    what = f"{path}: 7 weights in AWQ int4 in groups of 16, {size:,} bytes, are"
    assert caplog.messages == [f"{what} dequantised to float32, {weights * 4:,} bytes", f"{what} kept so"]


Break = Callable[[Tensors], Any]
K = "model.layers.0.self_attn.k_proj"
BROKEN: dict[str, tuple[str, Break, str]] = {
    "no scale": ("fp8-block", lambda t: t.pop(f"{K}.weight_scale_inv"), rf"FP8 tensor {K}\.weight has no scale"),
    "no weight": ("fp8-block", lambda t: t.pop(f"{K}.weight"), rf"{K}\.weight_scale_inv has no FP8 tensor"),
    "scale's shape": (
        "fp8-block",
        lambda t: t.update({f"{K}.weight_scale_inv": np.ones((2, 2), np.float32)}),
        rf"tensor {K}\.weight_scale_inv has shape \[2, 2\]; expected \[1, 2\]",
    ),
    "channel scale's shape": (
        "compressed-channel",
        lambda t: t.update({f"{K}.weight_scale": np.ones(7, np.float32)}),
        rf"{K}\.weight_scale has shape \[7\]; expected \[16, 1\] or one number",
    ),
    "scale's dtype": (
        "fp8-block",
        lambda t: t.update({f"{K}.weight_scale_inv": np.ones((1, 2), np.int32)}),
        rf"{K}\.weight_scale_inv is int32; expected float32",
    ),
    "no scales": ("awq", lambda t: t.pop(f"{K}.scales"), rf"no tensor {K}\.scales"),
    "no zeros": ("gptq", lambda t: t.pop(f"{K}.qzeros"), rf"no tensor {K}\.qzeros"),
    "no codes": ("gptq", lambda t: t.pop(f"{K}.qweight"), rf"no tensor {K}\.weight \(1 missing\)"),
    "group size": (
        "awq",
        lambda t: t.update({f"{K}.scales": np.ones((4, 16), np.float16)}),
        rf"tensor {K}\.scales has shape \[4, 16\]; expected \[2, 16\]",
    ),
    "columns": (
        "awq",
        lambda t: t.update({f"{K}.qweight": np.ones((30, 2), np.int32)}),
        rf"{K}\.qweight has 30 columns; expected whole groups of 16",
    ),
    "g_idx": (
        "gptq",
        lambda t: t.update({f"{K}.g_idx": np.full(32, 2, np.int32)}),
        rf"tensor {K}\.g_idx is 2 to 2; expected 0 to 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_named(tmp_path: Path, case: str) -> None:
    format, change, message = BROKEN[case]
    path, stored, _ = make(tmp_path, format)
    change(stored)
    save_file(stored, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_biases_of_zeros_that_gptq_writers_add(tmp_path: Path) -> None:
    path, stored, plain = make(tmp_path, "gptq")
    bias = f"{K}.bias"
    save_file({**stored, bias: np.zeros(16, np.float16)}, path / "model.safetensors")
    close(load(path), load(plain))
    save_file({**stored, bias: np.ones(16, np.float16)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{K}\.bias has no place"):
        load(path)


def test_dummy_weights_are_fp8_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": BLOCKS}))
    checkpoint, kept = open_checkpoint(str(tmp_path), load_format="dummy"), Keeping()
    spec = ModelSpec.from_hf_config(checkpoint.config)
    both = [load_params(checkpoint, spec, "float32", backend, progress=False) for backend in (kept, Plain())]
    close(*both)
    assert {p.name for p in kept.taken if p.quant} == {"qkv", "o", "gate_up", "down"}
    assert 0.015 < both[0].layers[0]["down"].value.std() < 0.025


def test_quantised_tensors_that_the_config_does_not_tell_of(tmp_path: Path) -> None:
    path, _, _ = make(tmp_path, "fp8-tensor")
    (path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="has no place in LlamaForCausalLM"):
        load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method is 'aqlm'; expected one of awq, compressed-tensors, fp8, gptq, mxfp4"),
        ({**BLOCKS, "weight_block_size": [128]}, r"weight_block_size is \[128\]; expected \[rows, columns\]"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt is 'e5m2'; expected 'e4m3'"),
        ({**AWQ, "bits": 8}, "bits is 8; expected 4"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; expected 'gemm'"),
        ({**GPTQ, "group_size": 0}, "group_size is 0; expected an integer >= 1"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; expected 'gptq' or 'gptq_v2'"),
        (compressed("group"), "config_groups.group_0.weights.strategy is 'group'"),
        ({**compressed("group", type="int", num_bits=8), "format": "pack-quantized"}, "num_bits is 8; expected 4"),
        (compressed("tensor", num_bits=4), "config_groups.group_0.weights.num_bits is 4; expected 8"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_hf_config({**CONFIG, "quantization_config": config})
