"""`check` of a model with latent attention on a backend that has none, and of one with windows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.layered import each_array
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.mesh import NumpyMesh
from polyradix.backend.numpy.ops import NumpyOps
from polyradix.backend.protocol import KVSpec, Memory, ParamSpec, Reader
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.serve import check as module
from polyradix.serve.check import Question, check, text

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "torch_dtype": "float32",
}


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "sliding_window": 32,
    "sliding_window_pattern": 4,
    "torch_dtype": "float32",
}


LLAMA = {**GEMMA, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "vocab_size": 101}


class Counted(NumpyMesh):
    """One rank's bytes of the arrays that it was given and made, and as many free ones as these leave."""

    def __init__(self, tp: int) -> None:
        super().__init__("float32", False, tp)
        self.weights = self.cache = 0

    def memory(self) -> Memory:
        return Memory(400_000 - self.weights - self.cache, 400_000)

    def pack(self, spec: ParamSpec, read: Reader) -> Any:
        out = super().pack(spec, read)
        self.weights += out[0].value.nbytes + (0 if out[0].bias is None else out[0].bias.nbytes)
        return out

    def alloc_kv(self, spec: KVSpec, pages: int) -> Any:
        out = super().alloc_kv(spec, pages)
        self.cache = sum(x.nbytes for parts in each_array(out[0]) for x in parts)
        return out


class WithoutLatent(NumpyOps):
    attend_latent = Expansions.attend_latent


@pytest.mark.parametrize("claims", [False, True])
def test_what_a_backend_lacks(claims: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **options: Any) -> NumpyBackend:
        backend = NumpyBackend("float32", False)
        if not claims:
            backend.ops = WithoutLatent(backend._wide, backend._store)
            backend.caps = replace(backend.caps, features=backend.caps.features - {"mla"})
        return backend

    monkeypatch.setattr(module, "open_backend", opened)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    report = check(Question(str(tmp_path), load_format="dummy"))
    assert report["verbs"]["attend_latent"] == ("own" if claims else "declined")
    assert report["features"] == {"mla": claims}
    assert report["context"] == 64
    shown = "\n".join(text(report))
    assert ("mla (MISSING)" in shown) == ("attend_latent (declined)" in shown) == (not claims)
    assert shown.endswith("can run") == claims
    assert ("needs feature mla" in shown) == (not claims)
    assert "decode   of 64: " in shown
    assert "at most" not in shown


def test_blocks_that_ranks_cut(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = {**CONFIG, "n_shared_experts": 0, "quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole, split = (check(Question(str(tmp_path), "numpy", load_format="dummy", tp=tp)) for tp in (1, 2))
    assert all("weights in random FP8 in blocks of 16x16" in said for said in whole["quantised"])
    line = "model.layers.0.mlp.down_proj: tp is 2 and cuts blocks of 16 of the 48 columns into 8, too narrow to keep"
    assert any(said.startswith(line) for said in split["quantised"])
    assert line in "\n".join(text(split))
    assert not split["reasons"]
    uneven = check(Question(str(tmp_path), "numpy", load_format="dummy", tp=3))
    assert uneven["reasons"] == ["tp is 3; expected a divisor of the model's num_attention_heads (2)"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, {**GEMMA, "num_key_value_heads": 2}, LLAMA])
def test_the_engine_takes_what_was_said(
    tmp_path: Path, config: dict[str, Any], tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose memory is that of the arrays in it."""
    backend = Counted(tp)
    monkeypatch.setattr(module, "open_backend", lambda *args, **options: backend)
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = check(Question(str(tmp_path), load_format="dummy", tp=tp))
    core = EngineCore(EngineConfig(model=str(tmp_path), load_format="dummy", max_seqs=1000, progress=False), backend)
    assert backend.weights == report["weights"]
    assert core.pages == report["kv_pages"]
    assert backend.cache == report["kv_pages"] * report["kv_page"]


def test_a_cache_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(NumpyBackend):
        def kv_page_bytes(self, spec: KVSpec) -> int:
            raise Unsupported("head_dim", f"{spec.head_dim}; expected a multiple of 16")

        def pack(self, spec: ParamSpec, read: Reader) -> Any:
            raise AssertionError("weights are read")

    backend = Narrow("float32", False)
    monkeypatch.setattr(module, "open_backend", lambda *args, **options: backend)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    report = check(Question(str(tmp_path), load_format="dummy"))
    said = r"unsupported: head_dim \(24; expected a multiple of 16\)"
    assert re.search(said, report["reasons"][0])
    with pytest.raises(Unsupported, match=said):
        EngineCore(EngineConfig(model=str(tmp_path), load_format="dummy", progress=False), backend)


def test_windows_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    report = check(Question(str(tmp_path), "numpy", load_format="dummy", context=1024, page_size=16))
    assert report["kv_groups"] == {"full": 1, "windowed": 3, "window": 32}
    assert report["kv_page"] == 16 * 2 * 8 * 4  # tokens, k and v, columns and bytes of one layer
    assert report["kv_sequence"] == (64 + 3 * 3) * report["kv_page"]
    assert "a page of 16 tokens of one of 4 groups, 3 with windows" in "\n".join(text(report))
    report = check(Question(str(tmp_path), "numpy", load_format="dummy", context=32, page_size=16))
    assert report["kv_groups"]["windowed"] == 0
    assert report["kv_sequence"] == 2 * 4 * 16 * 2 * 8 * 4
