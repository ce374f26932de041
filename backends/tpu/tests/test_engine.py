"""The whole engine on an emulated mesh: the greedy tokens are those of the reference."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from polyradix.backend.protocol import Memory
from polyradix.backend.registry import open_backend
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.schedule.params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "initializer_range": 0.02,
}


def engine(folder, device: str, tp: int = 1, backend: Any = None) -> EngineCore:
    config = EngineConfig(
        model=str(folder),
        device=device,
        tp=tp,
        dtype="float32",
        max_seqs=4,
        max_tokens_per_step=32,
        kv_pages=40,
        load_format="dummy",
        progress=False,
        emulate=True,
    )
    backend = backend or open_backend(device, tp=tp, emulate=True)
    return EngineCore(config, backend, open_checkpoint(str(folder), load_format="dummy"))


def answers(folder, device: str, tp: int = 1) -> dict[str, list[int]]:
    core = engine(folder, device, tp)
    rng = np.random.default_rng(2)
    out: dict[str, list[int]] = {}
    for i, n in enumerate((5, 40, 17, 1, 40)):
        core.submit(str(i), rng.integers(0, 300, n), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            assert not chunk.error
            out.setdefault(chunk.rid, []).extend(chunk.tokens)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return answers(folder, "numpy")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_greedy_tokens_are_those_of_numpy(folder, expected, tp):
    assert len({tuple(tokens) for tokens in expected.values()}) > 2
    assert answers(folder, "tpu", tp) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 512}, "needs head_dim 512; the backend offers multiples of 2 up to 256"),
        (
            {"vocab_size": 10_000_000},
            r"take 3,840,\d+,\d+ bytes .* 1,000,000,000 are free: 2,840,\d+,\d+ too few",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, change, message):
    def pack(*args: Any) -> None:
        raise AssertionError("a weight was packed")

    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    backend = open_backend("tpu", tp=2, emulate=True)
    monkeypatch.setattr(backend, "pack", pack)
    monkeypatch.setattr(backend, "memory", lambda: Memory(10**9, 10**9))
    with pytest.raises((ConfigError, MemoryError), match=message):
        engine(tmp_path, "tpu", 2, backend)
