"""Models fetched by name from a hub on this machine, whole, in parts, and not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_hub import Hub, Repo, running
from huggingface_hub import constants, file_download
from safetensors.numpy import load_file, save_file

from polyradix.engine.offline import Engine
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.errors import CheckpointError
from polyradix.graph.spec import ModelSpec
from polyradix.serve.check import Question, check

SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def folders(byte_model: Callable[[int, str], Path]) -> dict[str, Path]:
    """Two revisions of a model: the same shapes, other weights, two shards with an index."""
    return {name: filled(byte_model(2, ""), seed) for seed, name in enumerate(("main", "v2"))}


def filled(folder: Path, seed: int) -> Path:
    spec = ModelSpec.from_hf_config(json.loads((folder / "config.json").read_text()))
    rng = np.random.default_rng(seed)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in tensor_shapes(spec).items()}
    owner = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if owner[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def hub(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where this process looks, with an empty cache. Nobody waits before trying again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as hub:
        look_at(hub.url, monkeypatch)
        hub.repos["o/m"] = Repo(folders)
        yield hub


def look_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def equal(model: str, folder: Path, **options: Any) -> bool:
    checkpoint = open_checkpoint(model, **options)
    want = {name: x for shard in SHARDS for name, x in load_file(folder / shard).items()}
    return checkpoint.names == want.keys() and all((checkpoint.read(n) == x).all() for n, x in want.items())


def refused(model: str, said: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        open_checkpoint(model, **options)
    assert model in str(error.value)
    assert "\n" not in str(error.value)


def test_another_process_generates(tmp_path: Path, hub: Hub, folders: dict[str, Path]) -> None:
    code = """if True:
    from polyradix import Engine
    for revision in (None, "v2"):
        engine = Engine("o/m", revision=revision, device="numpy", kv_pages=9, progress=False)
        print(engine.generate("abc", max_tokens=8)[0].tokens)
    """
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0, done.stderr
    own = [Engine(str(f), device="numpy", kv_pages=9, progress=False) for f in folders.values()]
    want = [engine.generate("abc", max_tokens=8)[0].tokens for engine in own]
    assert done.stdout.split("\n")[:-1] == [str(tokens) for tokens in want]
    assert want[0] != want[1]
    assert not [path for _, path, _ in hub.asked if "README" in path]


def test_what_was_fetched_stays(hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal("o/m", folders["main"])
    assert equal("o/m", folders["v2"], revision="v2")
    assert not equal("o/m", folders["main"], revision="v2")
    assert hub.sent(SHARDS[0]) == [None, None]
    look_at("http://127.0.0.1:1", monkeypatch)
    assert equal("o/m", folders["main"])
    assert equal("o/m", folders["v2"], revision="v2")


def test_only_what_is_read_is_fetched(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    assert open_checkpoint("o/m", load_format="dummy").dummy
    assert not [path for _, path, _ in hub.asked if "safetensors" in path and not path.endswith(".json")]
    both = tmp_path / "both"
    shutil.copytree(folders["main"], both)
    save_file({"norm.weight": np.ones(4, np.float32)}, both / "consolidated.safetensors")
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(both / "consolidated.safetensors", own)
    (own / "params.json").write_text(json.dumps({"qk_nope_head_dim": 2}))
    hub.repos |= {"o/both": Repo({"main": both}), "o/own": Repo({"main": own})}
    assert equal("o/both", folders["main"])
    assert not hub.sent("consolidated")
    assert open_checkpoint("o/own").names == {"model.norm.weight"}


def test_check_fetches_headers(hub: Hub, folders: dict[str, Path]) -> None:
    """Unless the files are here anyway; it says what it says of a folder."""
    want = check(Question(str(folders["v2"]), "numpy"))
    for whole in (False, True):
        hub.asked.clear()
        got = check(Question("o/m", "numpy", revision="v2"))
        assert got.keys() == want.keys()
        assert all(got[name] == want[name] for name in want.keys() - {"model", "free", "sequences", "kv_pages"})
        assert sorted(hub.sent("safetensors")) == ([] if whole else ["bytes=0-100000"] * 2)
        open_checkpoint("o/m", revision="v2")
    refused("o/gone", "^o/gone: cannot be fetched from the Hub: .*Repository Not Found", headers=True)


@pytest.mark.parametrize("ordered", [False, True])
def test_headers_of_gptq(hub: Hub, tmp_path: Path, ordered: bool) -> None:
    """Whether columns have an order of their own, and that there are biases, is not in a header."""
    method = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": ordered}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": method}))
    groups = np.arange(32, dtype=np.int32) // 16
    tensors = {
        "q.qweight": np.ones((4, 8), np.int32),
        "q.qzeros": np.ones((2, 1), np.int32),
        "q.scales": np.ones((2, 8), np.float16),
        "q.g_idx": groups[::-1].copy() if ordered else groups,
        "q.bias": np.ones(8, np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    hub.repos["o/q"] = Repo({"main": tmp_path})
    want, got = open_checkpoint(str(tmp_path)), open_checkpoint("o/q", headers=True)
    assert got.names == want.names == {"q.weight", "q.bias"}
    for c in (want, got):
        assert ("each of any columns" in c.stored["q.weight"].what) == ordered
    assert got.stored["q.weight"].nbytes == want.stored["q.weight"].nbytes


def test_a_lost_connection_resumes(hub: Hub, folders: dict[str, Path]) -> None:
    hub.breaks[SHARDS[1]] = [3000, 0, 2000]
    assert equal("o/m", folders["main"])
    assert hub.sent(SHARDS[1]) == [None, "bytes=3000-", "bytes=3000-", "bytes=5000-"]


def test_half_a_model(hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.breaks[SHARDS[1]] = [3000, *[0] * 6]
    refused("o/m", "^o/m: cannot be fetched from the Hub: ")
    look_at("http://127.0.0.1:1", monkeypatch)
    refused("o/m", f"cannot be fetched from the Hub: .*{SHARDS[1]}")
    look_at(hub.url, monkeypatch)
    hub.breaks.clear()
    assert equal("o/m", folders["main"])


def test_nothing_to_fetch(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("o/gone", "^o/gone: cannot be fetched from the Hub: .*Repository Not Found")
    refused("o/m", "^o/m: cannot be fetched from the Hub: .*Revision Not Found.*v3", revision="v3")
    refused("o/m/x.gguf", "^o/m/x.gguf: no such file here, and it cannot be fetched from the Hub: .*Entry Not Found")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "model.gguf").write_bytes(b"GGUF")
    hub.repos["o/none"] = Repo({"main": tmp_path / "none"})
    refused("o/none", r"^o/none: the repository has no \*\.safetensors; for a GGUF file give o/none/FILE\.gguf")
    look_at("http://127.0.0.1:1", monkeypatch)
    refused("o/m", "^o/m: cannot be fetched from the Hub: .*Connection refused")


def test_a_gated_model(hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["o/gated"] = Repo(folders, token="hf_right")
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        refused("o/gated", "^o/gated: cannot be fetched from the Hub: .*gated repo.*is restricted")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert equal("o/gated", folders["main"])


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blob.incomplete")

    monkeypatch.setattr(file_download, "http_get", full)
    refused("o/m", "^o/m: cannot be fetched from the Hub: .*No space left on device")


def test_a_gguf_file(hub: Hub, tmp_path: Path) -> None:
    want = np.arange(64, dtype=np.float32).reshape(4, 16)
    (tmp_path / "repo" / "sub").mkdir(parents=True)
    writer = gguf.GGUFWriter(tmp_path / "repo" / "sub" / "tiny.Q8_0.gguf", "llama")
    writer.add_tensor("token_embd.weight", want)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.repos["o/files"] = Repo({"main": tmp_path / "repo"})
    checkpoint = open_checkpoint("o/files/sub/tiny.Q8_0.gguf")
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), want)


def test_revisions_are_the_hubs(hub: Hub, folders: dict[str, Path]) -> None:
    refused(str(folders["main"]), "revision is 'v2'; expected none, as .* is not on the Hub", revision="v2")
    refused("demo", "revision is 'v2'; expected none, as demo is not on the Hub", revision="v2")
