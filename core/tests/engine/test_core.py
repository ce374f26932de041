"""The step loop on the NumPy backend: overlapped and not, and when things go wrong."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import DeviceLost
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import Limits, Memory
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk
from polyradix.engine.start import largest
from polyradix.schedule.params import InvalidParam, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))

    def make(overlapped: bool = False, **options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 40, "max_seqs": 8, "page_size": 4, "max_tokens_per_step": 24}
        base |= {"device": "numpy", "load_format": "dummy", "progress": False, "model": str(path)}
        base["backend_options"] = {"async_launch": overlapped}
        backend = options.pop("backend", None)
        return EngineCore(EngineConfig(**(base | options)), backend)

    return make


def _submit(core: EngineCore, n: int, **params: Any) -> None:
    rng = np.random.default_rng(2)
    head = rng.integers(1, 97, 9)
    for i in range(n):
        prompt = np.concatenate((head, rng.integers(1, 97, 3 + 5 * i))).astype(np.int32)
        core.submit(f"r{i}", prompt, SamplingParams(max_tokens=6 + i, seed=i, ignore_eos=True, **params))


def _drain(core: EngineCore) -> dict[str, list[Chunk]]:
    out: dict[str, list[Chunk]] = {}
    while core.has_work:
        for chunk in core.step():
            out.setdefault(chunk.rid, []).append(chunk)
        core.scheduler.check()
    return out


def _tokens(chunks: dict[str, list[Chunk]]) -> dict[str, list[int]]:
    return {rid: [t for c in parts for t in c.tokens] for rid, parts in chunks.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pages", [40, 16])  # 16: requests are put back and computed again
def test_overlapped_equals_one_step_at_a_time(make: Any, temperature: float, pages: int) -> None:
    results = []
    for overlapped in (False, True):
        core = make(overlapped, kv_pages=pages)
        _submit(core, 5, temperature=temperature)
        results.append(_tokens(_drain(core)))
        assert core.stats().pages_used == 0
    assert results[0] == results[1]
    assert {rid: len(tokens) for rid, tokens in results[0].items()} == {f"r{i}": 6 + i for i in range(5)}


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_step_that_fails_ends_its_requests_and_no_others(make: Any, overlapped: bool, where: str) -> None:
    core = make(overlapped)
    _submit(core, 3, temperature=0)
    for _ in range(3):
        core.step()
    name, real = ("prepare", core.backend.prepare) if where == "launch" else ("fetch", core.backend.fetch)

    def fails(*args: Any) -> Any:
        setattr(core.backend, name, real)
        if where == "launch":
            raise RuntimeError("out of order")
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("out of order"))
        return future

    setattr(core.backend, name, fails)
    chunks = _drain(core)
    failed = {rid for rid, parts in chunks.items() if parts[-1].finish == "error"}
    assert failed
    assert all("out of order" in chunks[rid][-1].error for rid in failed)
    assert core.stats().pages_used == 0
    core.submit("next", np.arange(1, 9, dtype=np.int32), SamplingParams(max_tokens=3, ignore_eos=True))
    assert _drain(core)["next"][-1].finish == "length"


@pytest.mark.parametrize("where", ["prepare", "fetch"])
def test_a_lost_device_ends_what_it_had_and_is_logged_once(
    make: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = make(overlapped=True, max_seqs=4)
    _submit(core, 6, temperature=0)
    chunks = [chunk for _ in range(3) for chunk in core.step()]

    def lost(*args: Any) -> Any:
        if where == "prepare":
            raise DeviceLost("it is on fire")
        future: Future[Any] = Future()
        future.set_exception(DeviceLost("it is on fire"))
        return future

    setattr(core.backend, where, lost)
    while not core.lost:
        chunks += core.step()
    assert core.lost == "it is on fire"
    failed = [chunk for chunk in chunks if chunk.finish == "error"]
    assert {chunk.error for chunk in failed} == {"DeviceLost: it is on fire"}
    assert len({chunk.rid for chunk in failed}) == len(failed) == 6 - core.stats().waiting - core.stats().finished > 0
    assert [r.exc_info is not None for r in caplog.records if r.levelname == "ERROR"] == [True]
    core.scheduler.check()
    assert core.stats().pages_used == 0
    with pytest.raises(DeviceLost, match="it is on fire"):
        core.step()


def test_out_of_memory_says_what_to_change(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, spec: Any, pages: int) -> Any:
        raise MemoryError("3 bytes are missing")

    core = make()
    _submit(core, 1)
    core.backend.prepare = partial(full, core)
    assert core.step()[0].error.startswith("MemoryError: 3 bytes are missing; lower mem_fraction, max_tokens_per_step")
    monkeypatch.setattr(NumpyBackend, "alloc_kv", full)
    with pytest.raises(ConfigError, match="out of memory: 3 bytes are missing; lower mem_fraction, max_tokens_per_"):
        make()


def test_what_runs_before_there_is_traffic(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest step first, in a cache of its own; then what it took is known, and decodes run in the real one."""
    seen: list[Any] = []

    class Warmed(NumpyBackend):
        def __init__(self) -> None:
            super().__init__("float32", False)
            self.caps = replace(self.caps, decode_sizes=(1, 2, 4, 16), mem_fraction=0.5)

        def prepare(self, batch: HostBatch, prev: Any = None) -> Any:
            assert len(set(batch.slots.tolist())) == batch.num_tokens
            assert batch.slots.min() >= 4
            seen.append((batch.num_tokens, batch.num_seqs, int(batch.pages.max())))
            return super().prepare(batch, prev)

        def alloc_kv(self, spec: Any, pages: int) -> Any:
            seen.append(pages)
            return super().alloc_kv(spec, pages)

        def memory(self) -> Memory:
            seen.append("memory")
            return Memory(free=200 * 1024, total=1 << 30)  # of 200 pages

    core = make(kv_pages=None, backend=Warmed())
    assert seen[seen.index(9) :] == [9, (24, 8, 8), "memory", 100, (8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1)]
    assert list(core.timeline.seconds) == ["open", "weights", "largest step", "cache", "decode sizes"]
    assert core.scheduler.config.single_rows
    _submit(core, 3)
    assert len(_drain(core)) == 3


@pytest.mark.parametrize(("limits", "tokens"), [((24, 5, 100), 24), ((24, 5, 3), 15), ((3, 5, 100), 3)])
def test_the_largest_step(limits: tuple[int, int, int], tokens: int) -> None:
    batch, pages = largest(Limits(*limits), 4)
    Limits(*limits).check(batch.sizes)
    assert batch.num_tokens == tokens
    used = {(int(batch.pages[s, p // 4]), p % 4) for s, n in enumerate(batch.kv_len) for p in range(n)}
    assert {(s // 4, s % 4) for s in batch.slots.tolist()} == used
    assert sorted({page for page, _ in used}) == list(range(1, pages))


def test_one_page_pool_refuses_what_cannot_fit_and_goes_on(make: Any) -> None:
    core = make(kv_pages=5)
    with pytest.raises(InvalidParam, match=r"17 tokens.*16"):
        core.submit("big", np.ones(17, np.int32), SamplingParams())
    core.submit("fits", np.ones(16, np.int32), SamplingParams(max_tokens=5, ignore_eos=True))
    assert _drain(core)["fits"][-1].finish == "length"


def test_a_cache_of_float8(make: Any) -> None:
    """Requests that are put back and computed again get the same tokens: rows are rounded before they are read."""
    tokens = {}
    for pages in (40, 16):
        core = make(kv_dtype="float8_e4m3fn", kv_pages=pages)
        assert core.info()["kv_dtype"] == "float8_e4m3fn"
        _submit(core, 8)
        tokens[pages] = _tokens(_drain(core))
    assert tokens[40] == tokens[16]
    backend = NumpyBackend("float32", False)
    backend.caps = replace(backend.caps, features=backend.caps.features - {"kv_fp8"})
    with pytest.raises(ConfigError, match="needs feature kv_fp8"):
        make(kv_dtype="float8_e4m3fn", backend=backend)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_context": 4096}, "max_context is 4096.*128"),
        ({"mem_fraction": 1.5}, r"mem_fraction is 1.5"),
        ({"kv_pages": 1}, "kv_pages is 1"),
        ({"max_seqs": 0}, "max_seqs is 0"),
    ],
)
def test_options_out_of_range_are_named(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("tokens", "words"), [([], "prompt"), ([1, 97], "97.*0 to 96"), ([-1], "-1"), ([1] * 128, "128 tokens.*128")]
)
def test_bad_prompts_are_refused(make: Any, tokens: list[int], words: str) -> None:
    with pytest.raises(InvalidParam, match=words):
        make().submit("x", np.array(tokens, np.int32), SamplingParams())
