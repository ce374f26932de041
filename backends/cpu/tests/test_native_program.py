"""A recorded step against the same verbs run one by one: the same bits, for any batch, with buffers reused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import KV, Array, AttnSpec, Heads, KVSpec, Limits, Meta, Ops, Params, Weight
from polyradix_cpu.native import LayerKV, NativeMeta, NativeOps, NativeWeight, alloc_kv, load
from polyradix_cpu.native.lib import check_sources
from polyradix_cpu.native.params import pack_linear

HEADS, HIDDEN, INNER, VOCAB, PAGE, LAYERS = Heads(6, 2, 16), 96, 160, 70, 16, 3
LIMITS = Limits(max_tokens=64, max_seqs=4, max_context=128)
ATTN = AttnSpec(HEADS, 0.25)


def step(ops: Ops, params: Params, kv: KV, m: Meta) -> tuple[Array, KV]:
    top = params.top

    def body(w: dict[str, Weight], carry: tuple[Array, Array], kv: KV) -> tuple[tuple[Array, Array], KV]:
        x, h = carry
        q, k, v = ops.qkv(x, w["qkv"], HEADS)
        q, k = ops.rms_norm(q, w["head"], 1e-5), ops.rms_norm(k, w["head"], 1e-5)
        q, k = ops.rope(q, k, top["rope"], m)
        a, kv = ops.attend(q, k, v, kv, m, ATTN)
        x, h = ops.add_rms_norm(ops.linear_reduce(a, w["o"]), h, w["norm"], 1e-5)
        g = ops.linear_gated(x, w["up"], "silu")
        return ops.add_rms_norm(ops.linear_reduce(g, w["down"]), h, w["norm"], 1e-5), kv

    h = ops.embed(top["embed"], m)
    (x, _), kv = ops.layers([body] * len(params.layers), params.layers, (ops.rms_norm(h, top["norm"], 1e-5), h), kv)
    return ops.logits(ops.last(x, m), top["logits"]), kv


def make(dtype: Any) -> tuple[NativeOps, Params, list[LayerKV]]:
    rng = torch.Generator().manual_seed(0)
    library = load()
    assert library is not None, "no native library: build it with `pip install -e backends/cpu`"

    def r(*shape: int, to: Any = dtype) -> Any:
        return (torch.randn(*shape, generator=rng) * shape[-1] ** -0.5).to(to)

    def plain(kind: str, *shape: int, to: Any = torch.float32) -> NativeWeight:
        return NativeWeight(kind, r(*shape, to=to) * 5, shape)

    width = (HEADS.q + 2 * HEADS.kv) * HEADS.dim
    layers: list[dict[str, Weight]] = [
        {
            "qkv": pack_linear(r(width, HIDDEN), r(width)), "head": plain("norm", HEADS.dim),
            "o": pack_linear(r(HIDDEN, 96)), "norm": plain("norm", HIDDEN),
            "up": pack_linear(r(2 * INNER, HIDDEN), None, True), "down": pack_linear(r(HIDDEN, INNER)),
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    top = {"embed": plain("embed", VOCAB, HIDDEN, to=dtype), "rope": plain("rope", 128, HEADS.dim),
           "norm": plain("norm", HIDDEN), "logits": pack_linear(r(VOCAB, HIDDEN))}  # fmt: skip
    name: Any = "float32" if dtype == torch.float32 else "bfloat16"
    return NativeOps(library, 2), Params(top, layers), alloc_kv(KVSpec(LAYERS, HEADS.kv, HEADS.dim, PAGE, name), 33)


def meta(parts: list[tuple[int, int, int]]) -> NativeMeta:
    """Tokens from..to of sequences whose pages are 1 + 8 * s onwards."""
    rows = [(s, p) for s, start, to in parts for p in range(start, to)]
    cu = np.cumsum([0] + [to - start for _, start, to in parts]).astype(np.int32)
    pages = np.array([[1 + 8 * s + i for i in range(8)] for s, *_ in parts], np.int32)
    owners, positions = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    slots = ((1 + 8 * owners + positions // PAGE) * PAGE + positions % PAGE).astype(np.int32)
    tokens = (owners * 31 + positions * 7) % VOCAB
    lengths = np.array([to for *_, to in parts], np.int32)
    return NativeMeta(HostBatch(tokens, positions, slots, cu, lengths, pages, cu[1:] - 1, tokens * 0 - 1))


BATCHES = [
    [(0, 0, 40)],
    [(1, 0, 17), (0, 40, 41), (2, 0, 46)],
    [(0, 41, 42), (1, 17, 18), (2, 46, 47)],
    [(3, 0, 1)],
    [(0, 42, 43), (1, 18, 40), (2, 47, 48), (3, 1, 2)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_is_eager(dtype: Any) -> None:
    (ops, params, kv), (_, _, other) = make(dtype), make(dtype)
    compiled = ops.compile(step, LIMITS)
    for parts in BATCHES:
        got, _ = compiled(params, kv, meta(parts))
        want, _ = step(ops, params, other, meta(parts))
        assert got.shape == (len(parts), VOCAB)
        assert torch.isfinite(got).all()
        assert torch.equal(got, want)
    for a, b in zip(kv, other, strict=True):
        assert torch.equal(a.data, b.data)


def test_a_whole_model_is_batch_invariant() -> None:
    ops, params, kv = make(torch.bfloat16)
    compiled = ops.compile(step, LIMITS)
    whole = compiled(params, kv, meta([(0, 0, 43)]))[0].clone()
    assert torch.equal(compiled(params, kv, meta([(1, 0, 5), (0, 42, 43), (2, 0, 9)]))[0][1], whole[0])
    for i in range(43):
        got = compiled(params, kv, meta([(0, i, i + 1)]))[0]
    assert torch.equal(got, whole)


def test_logits_outlive_the_next_step_and_buffers_are_reused() -> None:
    ops, params, kv = make(torch.float32)
    program = ops.record(step, params, kv, LIMITS)
    first = program.run(meta(BATCHES[0]), 1)
    kept = first.clone()
    program.run(meta([(1, 0, 30)]), 1)
    assert torch.equal(first, kept)
    shorter = ops.record(step, Params(params.top, params.layers[:2]), kv[:2], LIMITS)
    assert len(program._recorder.buffers) == len(shorter._recorder.buffers)
    assert len(program._ops) == 4 + 10 * LAYERS


def test_limits_are_kept_and_other_weights_are_recorded_anew() -> None:
    ops, params, kv = make(torch.float32)
    compiled = ops.compile(step, LIMITS)
    with pytest.raises(ValueError, match="batch of 65 tokens"):
        compiled(params, kv, meta([(0, 0, 65)]))
    before = compiled(params, kv, meta([(0, 0, 9)]))[0].clone()
    other = Params(params.top | {"norm": NativeWeight("norm", torch.zeros(HIDDEN), (HIDDEN,))}, params.layers)
    assert not torch.equal(compiled(other, kv, meta([(0, 0, 9)]))[0], before)
    assert torch.equal(compiled(params, kv, meta([(0, 0, 9)]))[0], before)


def test_isa_is_chosen_by_variable() -> None:
    code = "from polyradix_cpu.native import find_isa; print(find_isa())"

    def ask(isa: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"POLYRADIX_CPU_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert ask("none").stdout.strip() == "None"
    assert ask("avx2").stdout.strip() == "avx2"
    assert "expected one of amx, avx512, avx2 or none" in ask("sse").stderr


def test_libraries_of_other_sources_are_refused(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.h").write_text("int a;")
    (tmp_path / "px.sha256").write_text(hashlib.sha256(b"int a;").hexdigest())
    check_sources(tmp_path, sources)
    check_sources(tmp_path, tmp_path / "none")
    (sources / "a.h").write_text("int b;")
    with pytest.raises(RuntimeError, match="older than"):
        check_sources(tmp_path, sources)
