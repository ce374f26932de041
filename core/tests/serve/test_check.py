"""`check` of a model with latent attention on a backend that has none, and of one with windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyradix.backend.expand import Expansions
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyOps
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
