"""Forward passes that fail or are refused. What they compute is compared in tests/reference/test_forward.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.backend.capabilities import DeviceLost
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk, Read
from polyradix.schedule.params import InvalidParam, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(device: str = "numpy", **options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 12, "max_seqs": 4, "page_size": 4, "max_tokens_per_step": 16}
        base |= {"load_format": "dummy", "progress": False, "model": str(tmp_path), "embeddings": True}
        return EngineCore(EngineConfig(device=device, **(base | options)))

    return make


def read(rid: str, want: Any, n: int = 9) -> Read:
    return Read(rid, np.arange(1, n + 1, dtype="<i4").tobytes(), want)


def run(core: EngineCore) -> dict[str, Chunk]:
    out: dict[str, Chunk] = {}
    while core.has_work:
        out |= {c.rid: c for c in core.step() if c.finish}
        core.scheduler.check()
    return out


@pytest.mark.parametrize("want", ["last", "mean", "logprobs"])
def test_a_failure_ends_its_requests_alone(make: Any, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make()
    core.submit("g", np.array([1, 2, 3], np.int32), SamplingParams(max_tokens=6, ignore_eos=True))
    core.step()

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        for name in ("_logits", "_hidden"):
            patched.setattr(core._forward, name, (fail, None))
        core.read(read("a", want))
        core.read(read("b", want))
        out = run(core)
    assert [(out[rid].finish, out[rid].error) for rid in "ab"] == [("error", "RuntimeError: out of luck")] * 2
    assert out["g"].finish == "length"
    assert core.scheduler.pages_used == 0
    core.read(read("c", want))
    assert run(core)["c"].finish == "stop"


def test_a_lost_device_is_lost_for_all(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make()

    def fail(*_: Any) -> Any:
        raise DeviceLost("gone")

    monkeypatch.setattr(core._forward, "_hidden", (fail, None))
    core.read(read("a", "last"))
    (chunk,) = core.step()
    assert (chunk.finish, core.lost) == ("error", "gone")
    with pytest.raises(DeviceLost):
        core.step()


def test_what_is_refused(make: Any) -> None:
    with pytest.raises(InvalidParam, match="--embeddings"):
        make(embeddings=False).read(read("a", "last"))
    with pytest.raises(InvalidParam, match="masks"):
        make("null").read(read("a", "logprobs"))
    with pytest.raises(InvalidParam, match="44"):
        make().read(read("a", "last", 45))  # 11 pages of 4


def test_waits_for_pages(make: Any) -> None:
    core = make()
    core.submit("g", np.arange(1, 30, dtype=np.int32), SamplingParams(max_tokens=8, ignore_eos=True))
    core.step()
    core.read(read("a", "last", 40))
    assert [c.rid for c in core.step() if c.finish] == []
    assert {rid: c.finish for rid, c in run(core).items()} == {"g": "length", "a": "stop"}
