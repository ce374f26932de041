"""The golden models: their files are what transformers gives, and cases on them see a defect in a whole model."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyradix.backend.numpy import moe, ops
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyOps
from polyradix_conformance import golden
from polyradix_conformance.cases import all_cases
from polyradix_conformance.inputs import Part
from polyradix_conformance.oracle import _mix
from polyradix_conformance.runner import run_case
from polyradix_conformance.sabotage.attention import SpecKept
from polyradix_conformance.tolerance import K

FAMILIES = golden.families()
DTYPES = ("float32", "bfloat16")
CASES = {c.id: c for c in all_cases()}


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = spec_from_file_location("make_golden", Path(__file__).parents[1] / "golden" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", [f for f in FAMILIES if golden.load(f).spec.experts])
def test_no_expert_is_chosen_by_a_hair(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another expert moves logits by far more than any floor, so rounding must not choose."""
    random, calls = np.random.default_rng(0), []

    def chosen(choice: Any, s: Any) -> Any:
        found = moe.chosen(choice, s)
        for _ in range(8):
            near = moe.chosen(choice * (1 + 1e-5 * random.uniform(-1, 1, choice.shape)), s)
            assert (np.sort(near) == np.sort(found)).all()
        calls.append(s)
        return found

    monkeypatch.setattr(ops, "chosen", chosen)
    assert run_case(CASES[f"L3/{family}/whole/float32"], lambda tp: NumpyBackend("float32", False)).status == "pass"
    assert calls


@pytest.mark.parametrize("family", FAMILIES)
def test_truth_is_that_of_transformers(maker: Any, family: str) -> None:
    held = golden.load(family)
    model = maker.build(maker.config_of(family), maker.torch.float32)
    for seq, (prompt, tokens) in enumerate(zip(held.prompts, held.sequences, strict=True)):
        assert maker.generate(model, tokens[:prompt]).tolist() == tokens.tolist()
        logits = maker.whole(model, tokens)
        rows = [(p, row) for (s, p), row in held.at.items() if s == seq]
        assert {p for p, _ in rows} == set(maker.kept(prompt, len(tokens)))
        for position, row in rows:
            want = held.rows.logits[row]
            np.testing.assert_allclose(logits[position], want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert held.greedy(seq)[0] == logits[prompt - 1 :].argmax(axis=1).tolist()


def test_one_family_made_again_is_the_same(maker: Any) -> None:
    """Floors are rounding errors, which another processor's kernels change in part."""
    made, held = maker.make("qwen3"), golden.load("qwen3")
    assert made.config | {"transformers_version": ""} == held.config | {"transformers_version": ""}
    assert {name: tuple(shape) for name, shape in made.shapes.items()} == held.shapes
    for rows, prefix in ((held.rows, ""), (held.rebound, "rebound_")):
        np.testing.assert_allclose(made.arrays[f"{prefix}logits"], rows.logits, rtol=0, atol=1e-5 * 16)
        for dtype in DTYPES:
            ratio = made.arrays[f"{prefix}floor_{dtype}"] / rows.floors[dtype]
            assert ratio.min() > 0.5
            assert ratio.max() < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_floors_leave_room_to_see_a_defect(family: str) -> None:
    held = golden.load(family)
    size = held.rows.logits.std()
    second, best = np.sort(held.rows.logits, axis=1)[:, -2:].T
    shares = {"float32": 1.0, "bfloat16": 0.25}
    for dtype, share in [(d, shares[d]) for d in held.dtypes]:
        assert held.rows.floors[dtype].max() * K < {"float32": 1e-4, "bfloat16": 0.6}[dtype] * size
        assert (best - second > 2 * K * held.rows.floors[dtype]).mean() >= share


def test_weights_are_exact_in_bfloat16_and_as_defined() -> None:
    for name, shape in golden.load("qwen2").shapes.items():
        w = golden.weights(name, shape)
        assert w.dtype == np.float32
        assert w.shape == shape
        np.testing.assert_array_equal(w, w.astype(ml_dtypes.bfloat16).astype(np.float32))
    name, w = "model.layers.1.mlp.down_proj.weight", golden.weights("model.layers.1.mlp.down_proj.weight", (128, 192))
    for i in (0, 1, 191, 192, 24575):
        h = _mix(_mix((i * 0x9E3779B9 & 0xFFFFFFFF) ^ zlib.crc32(f"0 {name}".encode())))
        assert w.ravel()[i] == (h % 255 - 127) / 512
    assert (golden.weights(name, (128, 192), seed=1) != w).mean() > 0.9


def test_the_truth_of_a_part_is_that_of_its_last_token() -> None:
    held = golden.load("llama")
    row = held.at[4, 69]
    np.testing.assert_array_equal(held.ends([Part(4, 13, 70)]).logits, held.rows.logits[[row]])
    assert held.greedy(4)[0][0] == held.sequences[4][70]


@pytest.mark.parametrize("name", ["llama.json", "llama.npz"])
def test_a_changed_or_missing_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(str(golden.files(golden.__name__)))
    golden.load("llama")  # the manifest is read
    monkeypatch.setattr(golden, "files", lambda package: tmp_path)
    data = {n: (source / n).read_bytes() for n in ("llama.json", "llama.npz")}
    for n, content in data.items():
        (tmp_path / n).write_bytes(content)
    (tmp_path / name).write_bytes(data[name][:-1] + bytes([data[name][-1] ^ 1]))
    with pytest.raises(golden.GoldenError, match=f"{name} has sha256 .*; expected"):
        golden.load.__wrapped__("llama")
    (tmp_path / name).unlink()
    with pytest.raises(golden.GoldenError, match=f"{name}: unreadable"):
        golden.load.__wrapped__("llama")


class WindowOffByOne(NumpyOps):
    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: Any, a: Any) -> Any:
        return super().attend(q, k, v, kv, m, dataclasses.replace(a, window=a.window and a.window + 1))


class NormOverAllHeads(NumpyOps):
    def rms_norm(self, x: Any, w: Any, eps: float) -> Any:
        return super().rms_norm(x.reshape(len(x), -1), self._tiled(w, x), eps).reshape(x.shape)

    def _tiled(self, w: Any, x: Any) -> Any:
        return dataclasses.replace(w, value=np.resize(w.value, x[0].size))


class SumNotPassedOn(NumpyOps):
    """Only the fused verb is wrong, so that its expansion is right."""

    def add_rms_norm(self, x: Any, residual: Any, w: Any, eps: float) -> Any:
        return super().add_rms_norm(x, residual, w, eps)[0], residual


class ReduceBiasLost(NumpyBackend):
    def pack(self, spec: Any, read: Any) -> Any:
        return super().pack(dataclasses.replace(spec, bias=spec.bias and spec.kind != "linear_reduce"), read)


class RopeOff(NumpyBackend):
    """Angles are 1 % too large."""

    def pack(self, spec: Any, read: Any) -> Any:
        if spec.kind != "rope":
            return super().pack(spec, read)
        cos, sin = np.split(read().astype(np.float64), 2, axis=1)
        angles = np.unwrap(np.arctan2(sin, cos), axis=0) * 1.01
        table = np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        return super().pack(spec, lambda part="weight": table)


class StaleParams(NumpyBackend):
    """The compiled step keeps the parameters of its first call."""

    def compile(self, step: Any, limits: Any) -> Any:
        run, first = super().compile(step, limits), list[Any]()

        def stale(params: Any, kv: Any, meta: Any) -> Any:
            first.append(params)
            return run(first[0], kv, meta)

        return stale


class StaleRows(NumpyBackend):
    """A batch of fewer rows than the one before leaves the old row in its last place."""

    def compile(self, step: Any, limits: Any) -> Any:
        run, before = super().compile(step, limits), list[Any]()

        def stale(params: Any, kv: Any, meta: Any) -> Any:
            logits, kv = run(params, kv, meta)
            if before and len(before[-1]) > len(logits):
                logits[-1] = before[-1][len(logits) - 1]
            before.append(logits.copy())
            return logits, kv

        return stale


class NeverRenormalised(NumpyOps):
    def moe(self, x: Any, w: Any, s: Any) -> Any:
        return super().moe(x, w, dataclasses.replace(s, renormalise=False))


class ThirdExpertLost(NumpyOps):
    def moe(self, x: Any, w: Any, s: Any) -> Any:
        return super().moe(x, w, dataclasses.replace(s, top_k=min(s.top_k, 2)))


def broken(kind: type[Any]) -> Callable[[int], Any]:
    if issubclass(kind, NumpyBackend):
        backend = kind("float32", False)
    else:
        backend = NumpyBackend("float32", False)
        backend.ops = kind(backend._wide, backend._store)
    return lambda tp: backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "case", "unseen"),
    [
        (WindowOffByOne, "mistral/decode", "llama/decode"),
        (SpecKept, "qwen3-windows/whole", "mistral/whole"),
        (NormOverAllHeads, "qwen3/whole", "qwen2/whole"),
        (SumNotPassedOn, "smollm/whole", "smollm/expanded"),
        (ReduceBiasLost, "llama-bias/whole", "qwen2/whole"),
        (RopeOff, "llama/chunked", None),
        (StaleParams, "qwen2/rebound", "qwen2/decode"),
        (StaleRows, "llama/compiled", "llama/rebound"),
    ],
)
def test_a_defect_in_a_whole_model_is_seen(kind: type[Any], case: str, unseen: str | None, dtype: str) -> None:
    open = broken(kind)
    assert run_case(CASES[f"L3/{case}/{dtype}"], open).status == "fail"
    if unseen:
        assert run_case(CASES[f"L3/{unseen}/{dtype}"], open).status == "pass"


@pytest.mark.parametrize(
    ("kind", "case", "unseen"),
    [
        (NeverRenormalised, "mixtral/whole", "qwen3/whole"),
        (ThirdExpertLost, "qwen3-moe/decode", "mixtral/decode"),
        (StaleParams, "qwen3-moe/rebound", "qwen3-moe/whole"),
    ],
)
def test_a_defect_in_a_model_with_experts_is_seen(kind: type[Any], case: str, unseen: str) -> None:
    open = broken(kind)
    assert run_case(CASES[f"L3/{case}/float32"], open).status == "fail"
    assert run_case(CASES[f"L3/{unseen}/float32"], open).status == "pass"


class TemperatureLost(NumpyOps):
    def attend_latent(self, q: Any, c: Any, kv: Any, m: Any, w: Any, a: Any) -> Any:
        return super().attend_latent(q, c, kv, m, w, dataclasses.replace(a, attn_scale=0.0))


class LatentScalePlain(NumpyOps):
    """YaRN's part of the scale is lost."""

    def attend_latent(self, q: Any, c: Any, kv: Any, m: Any, w: Any, a: Any) -> Any:
        return super().attend_latent(q, c, kv, m, w, dataclasses.replace(a, scale=(a.nope + a.rope) ** -0.5))


class SelectionBiasLost(NumpyBackend):
    def pack(self, spec: Any, read: Any) -> Any:
        return super().pack(dataclasses.replace(spec, bias=spec.bias and spec.kind != "router"), read)


@pytest.mark.parametrize(
    ("kind", "case", "unseen"),
    [
        (TemperatureLost, "mistral-large-3/decode", "deepseek-v3/decode"),
        (LatentScalePlain, "deepseek-v2/whole", "mistral-large-3/whole"),
        (SelectionBiasLost, "deepseek-v3/whole", "deepseek-v2/whole"),
        (NeverRenormalised, "deepseek-v3/chunked", "deepseek-v2-lite/chunked"),
        (ReduceBiasLost, "deepseek-dense/mixed", "deepseek-v3/mixed"),
    ],
)
def test_a_defect_in_a_model_with_latent_attention_is_seen(kind: type[Any], case: str, unseen: str) -> None:
    open = broken(kind)
    assert run_case(CASES[f"L3/{case}/float32"], open).status == "fail"
    assert run_case(CASES[f"L3/{unseen}/float32"], open).status == "pass"


@pytest.mark.parametrize(
    ("family", "feature"),
    [("mistral", "window"), ("qwen2", "bias"), ("qwen3", "qk_norm"), ("mixtral", "moe"), ("deepseek-dense", "mla")],
)
def test_a_model_needs_its_features(family: str, feature: str) -> None:
    assert feature in CASES[f"L3/{family}/whole/float32"].needs.features
    assert CASES["L3/llama/whole/float32"].needs.features == frozenset()
