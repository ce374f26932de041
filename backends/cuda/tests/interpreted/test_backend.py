"""The CUDA backend on a fake GPU: conformance cases through its graphs, and what it captures when."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import polyradix_torch.gpu
from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import DeviceLost
from polyradix.backend.protocol import KVSpec, Limits, Params
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.cases import all_cases
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.runner import run_case
from polyradix_torch.gpu import Decode
from polyradix_torch.triton import prefix
from polyradix_torch.triton.capture import Graphs
from polyradix_torch.triton.ops import GpuMeta

CASES = {c.id: c for c in all_cases() if c.profile in ("dense", "mla", "quant")}
CAPTURED = (  # with decodes of 1, 2, 3, 5 and 64 sequences
    "L0/results/float32",
    "L1/attend/decode/normal/bfloat16",
    "L1/attend/decode/window-7/float32",
    "L1/attend_latent/decode/normal/bfloat16",
    "L1/gated/normal/bfloat16",
    "L1/kv_fp8/decode/bfloat16",
    "L1/kv_groups/decode/bfloat16",
    "L1/sample/grid/float32",
    "L1/sample/mask/bfloat16",
    "L1/logprobs/float32",
    "L2/copied/float32",
    "L2/fetched_later/float32",
    "L2/two_steps/bfloat16",
)
EAGER = ("L2/linked/bfloat16", "L2/fetched_later/bfloat16", "L2/two_steps/float32")
LIMITS = Limits(64, 4, 32)
RAGGED = Ragged((5, 9, 3, 6, 7), 16)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sequences that graphs were called with."""
    seen: list[int] = []
    call = Graphs.__call__

    def counted(self: Graphs, params: Any, kv: Any, static: Any, seqs: int) -> Any:
        seen.append(seqs)
        return call(self, params, kv, static, seqs)

    monkeypatch.setattr(Graphs, "__call__", counted)
    return seen


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(sequences, whether keys are shared) of the graphs that were captured."""
    seen: list[tuple[int, bool]] = []
    capture = Graphs._capture

    def counted(self: Graphs, *args: Any) -> Any:
        seen.append(args[-2:])
        return capture(self, *args)

    monkeypatch.setattr(Graphs, "_capture", counted)
    return seen


@pytest.mark.parametrize("case", CAPTURED)
def test_captured(case: str, make: Any, replays: list[int]) -> None:
    backend = make()
    result = run_case(CASES[case], lambda tp: backend)
    assert result.status == "pass", result.detail
    assert replays


def test_captured_with_shared_keys(
    make: Any, replays: list[int], captures: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row that is long enough shares its keys with itself; shorter batches come between."""
    for name, value in {"LEAST_KEYS": prefix.UNIT, "LEAST_MEMBERS": 1, "LEAST_SAVED": 0}.items():
        monkeypatch.setattr(prefix, name, value)
    backend = make()
    result = run_case(CASES["L1/attend/decode/normal/float32"], lambda tp: backend)
    assert result.status == "pass", result.detail
    assert True in [shared for _, shared in captures]
    assert replays


@pytest.mark.parametrize("case", EAGER)
def test_eager(case: str, make: Any, replays: list[int]) -> None:
    backend = make(capture=False)
    result = run_case(CASES[case], lambda tp: backend)
    assert result.status == "pass", result.detail
    assert not replays


def decode(seqs: int, prev: int = -1) -> HostBatch:
    batch = RAGGED.batch([Part(s, n - 1, n) for s, n in enumerate(RAGGED.lengths[:seqs])])
    batch.from_prev[:] = prev
    return batch


def step(ops: Any, params: Params, kv: Any, m: GpuMeta) -> tuple[torch.Tensor, Any]:
    """Logits are the tokens times a weight, plus the first number of the cache."""
    return m.tokens[:, None] * params.top["w"] + kv[0][0].flatten()[0], kv


class Run:
    """That step on a backend, compiled."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.run = backend, backend.compile(step, LIMITS)

    def kv(self, first: float) -> Any:
        kv = self.backend.alloc_kv(KVSpec(1, 1, 64, 16, "float32"), RAGGED.num_pages)
        kv[0][0].flatten()[0] = first
        return kv

    def __call__(self, weight: Params, kv: Any, batch: HostBatch, prev: Any = None) -> list[float]:
        logits, _ = self.run(weight, kv, self.backend.prepare(batch, prev))
        return [float(x) for x in self.backend.fetch(logits).result()[:, 0]]


def weight(value: float) -> Params:
    return Params({"w": torch.tensor([value])}, [])


def test_eager_decodes_cut_keys_by_how_many_they_are(make: Any) -> None:
    """Of 4 processors; into 4 parts at most."""
    backend = make(capture=False)
    assert [backend.prepare(decode(n)).paged.splits for n in (1, 2, 3, 5)] == [4, 4, 2, 1]


def test_only_decodes_that_fit_are_captured(make: Any) -> None:
    backend = make()
    assert isinstance(backend.prepare(decode(2)), GpuMeta), "nothing is compiled yet"
    Run(backend)
    kinds = [type(backend.prepare(b)) for b in (decode(4), decode(5), RAGGED.batch([Part(0, 0, 5)]))]
    assert kinds == [Decode, GpuMeta, GpuMeta]


@pytest.mark.parametrize("capture", [True, False])
def test_parameters_and_cache_are_rebound(make: Any, capture: bool) -> None:
    """There and back; in every size of batch; and logits that were fetched stay."""
    run = Run(make(capture))
    ones, tens, low, high = weight(1.0), weight(10.0), run.kv(0.0), run.kv(0.5)
    for seqs in (1, 3, 4, 2, 5):
        tokens = decode(seqs).tokens.astype(float)
        for params, kv, want in (
            (ones, low, tokens),
            (ones, low, tokens),
            (tens, low, tokens * 10),
            (tens, high, tokens * 10 + 0.5),
            (ones, low, tokens),
        ):
            assert run(params, kv, decode(seqs)) == want.tolist()


@pytest.mark.parametrize("capture", [True, False])
def test_tokens_of_the_step_before(make: Any, capture: bool) -> None:
    run = Run(make(capture))
    kv, batch = run.kv(0.0), decode(3)
    batch.from_prev[:] = [2, -1, 0]
    prev = torch.tensor([70, 80, 90], dtype=torch.int32)
    assert run(weight(1.0), kv, batch, prev) == [90.0, float(batch.tokens[1]), 70.0]
    with pytest.raises(ValueError, match="from_prev names rows of the previous samples, but prev is None"):
        run.backend.prepare(batch)


def test_two_decodes_in_flight(make: Any) -> None:
    """The second is launched before the first is read, with tokens that the first sampled."""
    run = Run(make())
    kv, params, backend = run.kv(0.0), weight(1.0), run.backend
    first, _ = run.run(params, kv, backend.prepare(decode(2)))
    asked, prev = backend.fetch(first), first[:, 0].int()
    second, _ = run.run(params, kv, backend.prepare(decode(2, prev=1), prev))
    tokens = decode(2).tokens
    assert backend.fetch(second).result()[:, 0].tolist() == [float(tokens[1])] * 2
    assert asked.result()[:, 0].tolist() == tokens.tolist()


def test_a_fetch_under_way(gpu: SimpleNamespace, make: Any) -> None:
    backend = make()
    for x in (torch.arange(6, dtype=torch.int32).view(2, 3), torch.ones(2, dtype=torch.bfloat16)):
        pending = backend.fetch(x)
        assert pending.done()
        got = pending.result(timeout=1)
        assert got.shape == tuple(x.shape)
        assert np.array_equal(got.astype(np.float32), x.float().numpy())


def test_every_size_is_captured_once_before_there_is_traffic(
    make: Any, replays: list[int], captures: list[tuple[int, bool]], tmp_path: Path
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"load_format": "dummy", "progress": False, "max_seqs": 2, "max_tokens_per_step": 8}
    core = EngineCore(EngineConfig(model=str(tmp_path), **options), make())
    assert replays == [2, 1]
    assert captures == [(2, False), (1, False)]
    assert core.pages == 2 * 4 + 1
    for name in ("a", "b"):  # each with a prefill, which runs eagerly, between the decodes
        core.submit(name, np.arange(5, dtype=np.int32), SamplingParams(max_tokens=2, ignore_eos=True))
        assert sum(len(chunk.tokens) for _ in range(3) for chunk in core.step()) == 2
    assert replays == [2, 1, 1, 1]
    assert len(captures) == 2


def test_a_fetch_that_takes_long(gpu: SimpleNamespace, make: Any) -> None:
    gpu.asked = 10**6
    pending = make().fetch(torch.arange(3))
    assert (pending.done(), pending.cancel(), pending.running()) == (False, False, True)
    for wait in (pending.result, pending.exception):
        with pytest.raises(TimeoutError, match=r"not done within 0\.01 s"):
            wait(timeout=0.01)
    gpu.asked = 5
    pending = make().fetch(torch.arange(3))
    assert pending.result(timeout=10).tolist() == [0, 1, 2]
    seen: list[Any] = []
    pending = make().fetch(torch.arange(3))
    pending.add_done_callback(seen.append)
    assert (seen, pending.exception(), pending.done()) == ([pending], None, True)


def test_a_gpu_that_answers_no_more(gpu: SimpleNamespace, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is lost where CUDA repeats the error, and only there."""
    backend, batch = make(), decode(2)
    pending = backend.fetch(torch.arange(3))
    gpu.broken = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"
    for ask in (pending.result, pending.result, lambda: backend.fetch(torch.arange(3)).result()):
        with pytest.raises(DeviceLost, match=r"^CUDA error: an illegal memory access was encountered$"):
            ask()
    assert isinstance(pending.exception(), DeviceLost)
    assert pending.done()

    def fails(*args: Any) -> Any:
        raise RuntimeError("CUDA error: invalid configuration argument")

    run = Run(make())
    monkeypatch.setattr(polyradix_torch.gpu, "upload", fails)
    run.backend._capture = False
    with pytest.raises(DeviceLost):
        run.backend.prepare(batch)
    gpu.broken = ""
    with pytest.raises(RuntimeError, match="invalid configuration argument") as error:
        run.backend.prepare(batch)
    assert not isinstance(error.value, DeviceLost)


def test_a_gpu_without_room(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    backend = make()
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"):
        backend.alloc_kv(KVSpec(1, 1, 8, 16, "float32"), 2)
