"""The NumPy backend against independent float64 formulas, and its promise that a token never depends on its batch."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy import entry
from polyradix.backend.protocol import AttnSpec, Heads, KVSpec, Limits, Params, ParamSpec

HEADS = Heads(q=4, kv=2, dim=8)
H, F, V, PAGE = 24, 40, 50, 4
HOST = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
LIMITS = Limits(max_tokens=64, max_seqs=8, max_context=32)


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def pack(backend: Any, name: str, kind: Any, value: Any, dtype: Any, bias: Any = None) -> Any:
    spec = ParamSpec(name, kind, value.shape, dtype, bias=bias is not None)
    parts = {"weight": value.astype(HOST[dtype]), "bias": bias if bias is None else bias.astype(HOST[dtype])}
    return backend.pack(spec, lambda part="weight": parts[part])


class Tiny:
    """A one-layer model that uses every verb."""

    def __init__(self, backend: Any, dtype: Any) -> None:
        r = np.random.default_rng(5)
        angles = np.arange(64)[:, None] * 0.3 ** np.arange(HEADS.dim // 2)
        table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        shapes = {"qkv": (64, H), "o": (H, 32), "up": (2 * F, H), "down": (H, F), "head": (V, H), "embed": (V, H)}
        w = {n: pack(backend, n, "linear", r.normal(size=s) / math.sqrt(s[1]), dtype) for n, s in shapes.items()}
        w["norm"] = pack(backend, "norm", "norm", r.normal(size=H), dtype)
        w["rope"] = pack(backend, "rope", "rope", table, "float32")
        self.backend = backend
        self.params = Params(w, [{}])
        self.spec = KVSpec(1, HEADS.kv, HEADS.dim, PAGE, dtype)
        self.kv = backend.alloc_kv(self.spec, 20)
        self.run = backend.compile(self.step, LIMITS)

    def step(self, ops: Any, params: Params, kv: Any, m: Any) -> Any:
        w = params.top

        def body(layer: Any, carry: Any, kv: Any) -> Any:
            x, residual = carry
            q, k, v = ops.qkv(x, w["qkv"], HEADS)
            q, k = ops.rope(q, k, w["rope"], m)
            y, kv = ops.attend(q, k, v, kv, m, AttnSpec(HEADS, HEADS.dim**-0.5))
            y, residual = ops.add_rms_norm(ops.linear_reduce(y, w["o"]), residual, w["norm"], 1e-5)
            return (ops.linear_reduce(ops.linear_gated(y, w["up"], "silu"), w["down"]), residual), kv

        x = ops.embed(w["embed"], m)
        (x, residual), kv = ops.layers(
            [body] * len(params.layers), params.layers, (ops.rms_norm(x, w["norm"], 1e-5), x), kv
        )
        return ops.logits(ops.last(ops.add(x, residual), m), w["head"]), kv

    def launch(self, batch: HostBatch, prev: Any = None) -> Any:
        logits, self.kv = self.run(self.params, self.kv, self.backend.prepare(batch, prev))
        return logits


def batch_of(*seqs: tuple[Any, int, Any], from_prev: Any = None) -> HostBatch:
    """One sequence is (new tokens, position of the first, its pages)."""
    counts = [len(tokens) for tokens, _, _ in seqs]
    positions = [start + i for tokens, start, _ in seqs for i in range(len(tokens))]
    slots = [p[(start + i) // PAGE] * PAGE + (start + i) % PAGE for t, start, p in seqs for i in range(len(t))]
    cu = np.cumsum([0, *counts]).astype(np.int32)
    pages = np.zeros((len(seqs), max(len(p) for _, _, p in seqs)), np.int32)
    for s, (_, _, p) in enumerate(seqs):
        pages[s, : len(p)] = p
    return HostBatch(
        tokens=np.concatenate([np.asarray(t, np.int32) for t, _, _ in seqs]),
        positions=ints(*positions),
        slots=ints(*slots),
        cu_q=cu,
        kv_len=ints(*[start + len(t) for t, start, _ in seqs]),
        pages=pages,
        last=cu[1:] - 1,
        from_prev=ints(*(from_prev or [-1] * len(positions))),
    )


A, B = np.arange(11) * 3 % V, np.arange(7) * 5 % V
PAGES_A, PAGES_B = [9, 2, 5], [1, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("async_launch", [False, True])
def test_bits_do_not_depend_on_the_batch(dtype: str, async_launch: bool) -> None:
    def logits(*batches: HostBatch) -> Any:
        tiny = Tiny(entry.create(async_launch=async_launch), dtype)
        return tiny.backend.fetch([tiny.launch(b) for b in batches][-1]).result()

    alone_a = logits(batch_of((A, 0, PAGES_A)))
    alone_b = logits(batch_of((B, 0, PAGES_B)))
    np.testing.assert_array_equal(logits(batch_of((A, 0, PAGES_A), (B, 0, PAGES_B))), np.r_[alone_a, alone_b])
    np.testing.assert_array_equal(logits(batch_of((B, 0, [12, 3]), (A, 0, [4, 6, 1]))), np.r_[alone_b, alone_a])
    chunked = logits(batch_of((A[:6], 0, PAGES_A)), batch_of((A[6:], 6, PAGES_A), (B, 0, PAGES_B)))
    np.testing.assert_array_equal(chunked, np.r_[alone_a, alone_b])
    steps = [batch_of((A[i : i + 1], i, PAGES_A)) for i in range(len(A))]
    np.testing.assert_array_equal(logits(*steps), alone_a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_near_its_float64_self(dtype: str) -> None:
    batch = batch_of((A, 0, PAGES_A), (B, 0, PAGES_B))
    want = Tiny(entry.create(compute="float64"), dtype).launch(batch)
    got = Tiny(entry.create(), dtype).launch(batch)
    assert want.dtype == np.float64
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5 if dtype == "float32" else 0.1)
    assert np.abs(got - want).max() > 0


@pytest.mark.parametrize("async_launch", [False, True])
def test_tokens_come_from_the_previous_samples(async_launch: bool) -> None:
    tiny = Tiny(entry.create(async_launch=async_launch), "float32")
    fetch = tiny.backend.fetch
    f, i = np.zeros(2, np.float32), np.zeros(2, np.int32)
    greedy = SampleBatch(f, i, f + 1, f, i, i)
    prev = tiny.backend.sample(tiny.launch(batch_of((A, 0, PAGES_A), (B, 0, PAGES_B))), greedy)
    # launched before the samples were fetched; the sequences changed places, and the prefill of a third came between
    rows = [1, -1, -1, 0]
    linked = tiny.launch(batch_of(([0], 7, PAGES_B), ([3, 4], 0, [6]), ([0], 11, PAGES_A), from_prev=rows), prev)
    linked = fetch(linked).result()
    a, b = fetch(prev).result()
    direct = tiny.launch(batch_of(([b], 7, PAGES_B), ([3, 4], 0, [6]), ([a], 11, PAGES_A)))
    np.testing.assert_array_equal(linked, fetch(direct).result())
    assert {int(a), int(b)} != {0}


def test_an_asynchronous_error_shows_when_fetched() -> None:
    tiny = Tiny(entry.create(async_launch=True), "float32")
    logits = tiny.launch(batch_of(([V + 9], 0, [1])))
    with pytest.raises(IndexError):
        tiny.backend.fetch(logits).result()


def test_verbs_against_formulas() -> None:
    backend = entry.create()
    ops: Any = backend.ops
    r = np.random.default_rng(1)
    x, y, w, bias = r.normal(size=(5, H)), r.normal(size=(5, H)), r.normal(size=(32, H)), r.normal(size=32)
    f = np.float32
    linear = pack(backend, "w", "linear", w, "float32", bias)
    norm = pack(backend, "n", "norm", y[0], "float32")

    def close(got: Any, want: Any) -> None:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

    close(ops.linear(x.astype(f), linear), x @ w.T + bias)
    close(ops.linear_reduce(x.astype(f), linear), x @ w.T + bias)
    q, k, v = ops.qkv(x.astype(f), linear, Heads(q=2, kv=1, dim=8))
    close(np.concatenate([q, k, v], axis=1), (x @ w.T + bias).reshape(5, 4, 8))
    close(ops.add(x.astype(f), y.astype(f)), x + y)
    rms = np.array([row / math.sqrt(sum(e * e for e in row) / H + 0.5) for row in x]) * y[0]
    close(ops.rms_norm(x.astype(f), norm, 0.5), rms)
    close(
        ops.gated(x.astype(f), "silu"),
        [[g / (1 + math.exp(-g)) * u for g, u in zip(e[:12], e[12:], strict=True)] for e in x],
    )
    with pytest.raises(Unsupported, match="gated"):
        ops.gated(x, "gelu")


def test_rope_turns_half_split_pairs() -> None:
    backend = entry.create()
    r = np.random.default_rng(2)
    q, angles = r.normal(size=(3, 2, 8)), r.normal(size=(9, 4))
    table = pack(backend, "t", "rope", np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "float32")
    meta = backend.prepare(batch_of(([1, 1, 1], 5, [1, 2])))
    got, _ = backend.ops.rope(q.astype(np.float32), q.astype(np.float32), table, meta)
    turned = (q[..., :4] + 1j * q[..., 4:]) * np.exp(1j * angles[5:8, None, :])
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.7), (1, 2.0)])
def test_attend_against_plain_loops(window: int | None, softcap: float | None) -> None:
    backend = entry.create()
    r = np.random.default_rng(3)
    q, k, v = (r.normal(size=(9, h, 8)).astype(np.float32) for h in (4, 2, 2))
    kv = backend.alloc_kv(KVSpec(1, 2, 8, PAGE, "float32"), 8)[0]
    for a in kv:
        a[...] = 1e30  # what no sequence owns must not be read
    spec = AttnSpec(HEADS, 0.4, window, softcap)
    first = backend.prepare(batch_of((A[:6], 0, [5, 2, 7])))
    _, kv = backend.ops.attend(q[:6], k[:6], v[:6], kv, first, spec)
    got, kv = backend.ops.attend(q[6:], k[6:], v[6:], kv, backend.prepare(batch_of((A[:3], 6, [5, 2, 7]))), spec)
    for t in range(6, 9):
        for h in range(4):
            js = [j for j in range(t + 1) if window is None or j > t - window]
            score = [float(q[t, h] @ k[j, h // 2]) * 0.4 for j in js]
            score = [softcap * math.tanh(s / softcap) if softcap else s for s in score]
            e = [math.exp(s) for s in score]
            want = sum(p * v[j, h // 2].astype(np.float64) for p, j in zip(e, js, strict=True)) / sum(e)
            np.testing.assert_allclose(got[t - 6, 8 * h : 8 * h + 8], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("async_launch", [False, True])
def test_pages_are_copied_exported_and_imported(async_launch: bool) -> None:
    tiny = Tiny(entry.create(async_launch=async_launch), "bfloat16")
    tiny.launch(batch_of((A, 0, PAGES_A)))
    backend, kv = tiny.backend, tiny.kv
    data = backend.export_pages(kv, PAGES_A).result()
    assert data.shape == (2, 1, 3, PAGE, 2, 8)
    assert data.dtype == ml_dtypes.bfloat16
    assert len(np.unique(data[:, :, :2].astype(np.float32))) > 100
    kv = backend.copy_pages(kv, [9, 2], [2, 3])  # page 2 is read before it is written
    np.testing.assert_array_equal(backend.export_pages(kv, [2, 3]).result(), data[:, :, :2])
    kv = backend.import_pages(kv, [15, 11, 13], data)
    np.testing.assert_array_equal(backend.export_pages(kv, [13, 15, 11]).result(), data[:, :, [2, 0, 1]])


def test_log_probabilities() -> None:
    backend = entry.create()
    x = np.array([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 5.0]], np.float32)
    got = backend.logprobs(x, np.array([0, 3], np.int32), 3)
    p = np.exp(x.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got.chosen, np.log([p[0, 0], p[1, 3]]), rtol=1e-6)
    np.testing.assert_array_equal(got.ids, [[1, 2, 0], [3, 0, 1]])
    np.testing.assert_allclose(got.values[0], np.log(p[0, [1, 2, 0]]), rtol=1e-6)


def test_refusals_name_field_value_and_expectation() -> None:
    tiny = Tiny(entry.create(), "float32")
    with pytest.raises(ValueError, match="from_prev names rows of the previous samples, but prev is None"):
        tiny.launch(batch_of(([1], 0, [1]), from_prev=[0]))
    with pytest.raises(ValueError, match="num_seqs 9; expected at most 8"):
        tiny.launch(batch_of(*[([1], 0, [1])] * 9))
    with pytest.raises(ValueError, match="kv_len 33; expected at most 32"):
        tiny.launch(batch_of(([1], 32, list(range(1, 10)))))
    with pytest.raises(ValueError, match=r"parameter up has shape \(2, 3\); expected \(3, 2\)"):
        tiny.backend.pack(ParamSpec("up", "linear", (3, 2), "float32"), lambda part="weight": np.zeros((2, 3)))
    half: Any = "float16"
    with pytest.raises(Unsupported, match="float16"):
        tiny.backend.pack(ParamSpec("up", "linear", (3, 2), half), lambda part="weight": np.zeros((3, 2)))
    with pytest.raises(Unsupported, match="needs page size 3"):
        tiny.backend.alloc_kv(KVSpec(1, 2, 8, 3, "float32"), 8)
    with pytest.raises(ValueError, match="expected \\(2, 1, 1, 4, 2, 8\\)"):
        tiny.backend.import_pages(tiny.kv, [1], np.zeros((2, 1, 1, 4, 2, 7)))
    with pytest.raises(ValueError, match="compute is 'float16'"):
        entry.create(compute="float16")  # type: ignore[arg-type]


def test_memory_and_page_bytes() -> None:
    backend = entry.create()
    memory = backend.memory()
    assert 0 < memory.free <= memory.total
    assert backend.kv_page_bytes(KVSpec(30, 3, 64, 16, "bfloat16")) == 30 * 2 * 3 * 64 * 16 * 2
