"""GGUF files written by the format's own writer, read back, then broken; and headers of any format with wrong bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from written import CONFIG, Tensors, load, weights, write, write_gguf

from polyradix.graph.checkpoint import open_checkpoint
from polyradix.graph.checkpoint.gguf import read_gguf
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ModelSpec


@pytest.mark.parametrize(
    ("arch", "family", "more"),
    [
        ("llama", "Llama", {}),
        ("llama", "Llama", {"attention_bias": True}),
        ("llama", "Llama", {"tie_word_embeddings": True}),
        ("qwen2", "Qwen2", {}),
        ("qwen3", "Qwen3", {}),
        ("gemma2", "Gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
        ("gemma3", "Gemma3", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    ],
)
def test_gguf_equals_the_folder(tmp_path: Path, arch: str, family: str, more: dict[str, Any]) -> None:
    config = {**CONFIG, "architectures": [f"{family}ForCausalLM"], "rope_theta": 5000.0, **more}
    t = weights(config)
    path = write_gguf(tmp_path / "m.gguf", arch, config, t)
    checkpoint = open_checkpoint(str(path))
    got, want = ModelSpec.from_hf_config(checkpoint.config), ModelSpec.from_hf_config(config)
    assert got.rms_eps == pytest.approx(want.rms_eps)
    assert got == ModelSpec(**{**vars(want), "rms_eps": got.rms_eps, "dtype": "bfloat16"})
    assert checkpoint.names == set(t)
    for name, value in t.items():
        value = (value + 1) - 1 if arch.startswith("gemma") and name.endswith("norm.weight") else value
        np.testing.assert_array_equal(checkpoint.tensor(name, value.shape), value, err_msg=name)


@pytest.mark.parametrize(("kind", "bits"), [("F16", 10), ("BF16", 7), ("Q8_0", 6), ("Q4_1", 3), ("Q4_0", 2)])
def test_quantised_gguf(tmp_path: Path, kind: str, bits: int) -> None:
    t = weights(CONFIG)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", "qwen2", CONFIG, t, kind)))
    name = "model.layers.1.mlp.down_proj.weight"
    error = np.abs(checkpoint.tensor(name, t[name].shape).astype(np.float32) - t[name])
    assert 0 < error.max() < np.abs(t[name]).max() * 2.0**-bits


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    def rope(**given: Any) -> Rope:
        path = write_gguf(tmp_path / "m.gguf", "llama", CONFIG, weights(CONFIG), rope=given)
        return ModelSpec.from_hf_config(open_checkpoint(str(path)).config).rope

    freqs = np.array([1, 2, 4, 8], np.float32)
    assert rope(freqs=freqs) == Rope(5000.0, freq_factors=(1.0, 2.0, 4.0, 8.0))
    linear, yarn = gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN
    assert rope(scaling_type=linear, scaling_factor=4.0) == Rope(5000.0, "linear", 4.0)
    got = rope(scaling_type=yarn, scaling_factor=4.0)
    assert (got.type, got.factor, got.original_max_position) == ("yarn", 4.0, CONFIG["max_position_embeddings"])


def test_header_agrees_with_the_public_reader(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", CONFIG, weights(CONFIG), "Q8_0")
    public = gguf.GGUFReader(path)
    meta = open_checkpoint(str(path)).gguf
    assert meta == {k: f.contents() for k, f in public.fields.items() if not k.startswith("GGUF.")}


def test_broken_ggufs(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", CONFIG, weights(CONFIG))
    whole = path.read_bytes()
    cases = {
        b"": "cannot be opened",
        b"GGML" + whole[4:]: "starts with b'GGML'; expected b'GGUF'",
        whole[:4] + b"\x09" + whole[5:]: "broken GGUF header: version is 9",
        whole[:60]: "broken GGUF header",
        whole[:400]: "broken GGUF header",
        whole[:-4]: r"cut off in tensor output_norm\.weight",
        whole[:8] + b"\xff" * 8 + whole[16:]: "broken GGUF header",
    }
    for data, said in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{said}"):
            open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, t: w.add_uint32("split.count", 2), "split.count is 2; expected one whole file"),
        (lambda w, t: w.add_array("general.alignment", [1]), "broken GGUF header"),
        (lambda w, t: t.update({"blk.0.attn_q.weight": np.ones((30, 32), np.float32)}), r"has shape \[30, 32\]; exp"),
        (
            lambda w, t: t.update({"blk.0.attn_q.weight": np.ones((32, 0), np.float32)}),
            r"has shape \[32, 0\]; expected \[32, 32\]",
        ),
        (lambda w, t: t.update({"output_norm.weight": np.array(1, np.float32)}), "output_norm.weight has 0 dimensions"),
        (lambda w, t: t.update({"output_norm.weight": np.ones(32, np.int8)}), "norm.weight of type I8 cannot be read"),
    ],
)
def test_odd_ggufs(tmp_path: Path, change: Callable[[gguf.GGUFWriter, Tensors], Any], said: str) -> None:
    path = tmp_path / "m.gguf"
    written = write_gguf(path, "llama", CONFIG, weights(CONFIG))
    old = gguf.GGUFReader(written)
    tensors = {t.name: np.array(t.data) for t in old.tensors}
    w = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    for name, f in old.fields.items():
        if name.startswith("llama."):
            w.add_key_value(name, f.contents(), f.types[0])
    change(w, tensors)
    for name, value in tensors.items():
        w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "odd.gguf")


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_headers_with_wrong_bytes(tmp_path: Path, format: str) -> None:
    """Are read, or refused with an error of ours."""
    if format == "gguf":
        path = write_gguf(tmp_path / "m.gguf", "llama", CONFIG, weights(CONFIG))
        size = min(t.offset for t in read_gguf(path)[1].values())
    else:
        path = write(tmp_path, weights(CONFIG)) / "model-0.safetensors"
        size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    whole, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(400):
        head = np.frombuffer(whole[:size], np.uint8).copy()
        head[rng.integers(0, size, rng.integers(1, 4))] = rng.choice(np.array([0, 255, 34, 57, rng.integers(256)]))
        path.write_bytes(head.tobytes() + whole[size:])
        try:
            checkpoint = open_checkpoint(str(path if format == "gguf" else tmp_path))
            for name, shape in tensor_shapes(ModelSpec.from_hf_config(checkpoint.config)).items():
                checkpoint.tensor(name, shape)
        except (CheckpointError, ModelError):
            refused += 1
    assert 100 < refused <= 400


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "phi3", CONFIG, {})
    with pytest.raises(
        ModelError, match=r"general\.architecture is 'phi3'; expected one of llama, qwen2, qwen3, gemma2"
    ):
        open_checkpoint(str(path))
