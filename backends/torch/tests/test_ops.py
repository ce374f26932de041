"""Verbs against NumPy float64 written from the contract's text, with plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import AttnSpec, Heads, KVSpec
from polyradix_torch import to_torch

HEADS = Heads(q=6, kv=2, dim=16)
PAGE = 4


def attention(q, keys, values, position, a):
    """One query row [Hq,D] over keys and values [L,Hkv,D], float64 -> [Hq*D]."""
    out = []
    for head in range(a.heads.q):
        source = head // (a.heads.q // a.heads.kv)
        seen = [p for p in range(position + 1) if a.window is None or p > position - a.window]
        scores = np.array([np.dot(q[head], keys[p, source]) * a.scale for p in seen])
        if a.softcap is not None:
            scores = a.softcap * np.tanh(scores / a.softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out.append(sum(w * values[p, source] for w, p in zip(weights, seen, strict=True)))
    return np.concatenate(out)


@pytest.fixture
def attend(backend, rng, batch_of):
    """Runs a batch through attend; returns its output and the float64 expectation. Pages nobody owns hold NaN."""

    def run(dtype, a, parts):
        spec = KVSpec(1, HEADS.kv, HEADS.dim, PAGE, dtype)
        kv = backend.alloc_kv(spec, 32)
        for cache in kv[0]:
            cache.fill_(float("nan"))
        wide = {}
        for name in ("k", "v"):
            wide[name] = [rng.standard_normal((done + n, HEADS.kv, HEADS.dim)) for done, n, _ in parts]
        cut = getattr(torch, dtype)
        rounded = {n: [torch.tensor(x).to(cut) for x in xs] for n, xs in wide.items()}
        for s, (done, _, pages) in enumerate(parts):
            for cache, name in zip(kv[0], ("k", "v"), strict=True):
                for p in range(done):
                    cache[pages[p // PAGE], p % PAGE] = rounded[name][s][p]
        q = torch.tensor(rng.standard_normal((sum(n for _, n, _ in parts), HEADS.q, HEADS.dim))).to(cut)
        new = {name: torch.cat([x[d:] for x, (d, _, _) in zip(xs, parts, strict=True)]) for name, xs in rounded.items()}
        meta = backend.prepare(batch_of(parts, PAGE))
        got, after = backend.ops.attend(q, new["k"], new["v"], kv[0], meta, a)
        assert after is kv[0]
        expected, row = [], 0
        for s, (done, n, _) in enumerate(parts):
            k, v = (rounded[name][s].double().numpy() for name in ("k", "v"))
            for p in range(done, done + n):
                expected.append(attention(q[row].double().numpy(), k, v, p, a))
                row += 1
        return got.double().numpy(), np.array(expected), got.dtype

    return run


RAGGED = [(0, 1, [3]), (7, 1, [9, 2]), (3, 6, [4, 11, 5]), (0, 13, [8, 1, 20, 13]), (16, 1, [30, 29, 28, 27, 26])]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("bfloat16", 1.5e-2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (5, None), (None, 2.0), (6, 3.0)])
def test_attend(attend, dtype, bound, window, softcap):
    got, expected, kind = attend(dtype, AttnSpec(HEADS, 0.3, window, softcap), RAGGED)
    assert kind == getattr(torch, dtype)
    assert np.abs(got - expected).max() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_bits_do_not_depend_on_the_chunk(backend, rng, batch_of, dtype):
    a = AttnSpec(HEADS, 0.25)
    length, pages = 43, [5, 9, 1, 7, 3, 2, 11, 4, 12, 6, 8]
    q, k, v = (
        torch.tensor(rng.standard_normal((length, heads, HEADS.dim))).to(getattr(torch, dtype)) for heads in (6, 2, 2)
    )

    def run(cuts):
        kv = backend.alloc_kv(KVSpec(1, HEADS.kv, HEADS.dim, PAGE, dtype), 16)[0]
        out = []
        for start, stop in pairwise(cuts):
            meta = backend.prepare(batch_of([(start, stop - start, pages)], PAGE))
            rows = slice(start, stop)
            out.append(backend.ops.attend(q[rows], k[rows], v[rows], kv, meta, a)[0])
        return torch.cat(out)

    whole = run([0, length])
    assert torch.equal(whole, run(list(range(length + 1))))
    assert torch.equal(whole, run([0, 1, 18, 19, 30, length]))


@pytest.mark.parametrize("shape", [(5, 40), (5, 3, 16)])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_rms_norm(backend, rng, shape, dtype, bound):
    x = torch.tensor(rng.standard_normal(shape) * 30).to(getattr(torch, dtype))
    w = torch.tensor(rng.standard_normal(shape[-1]))
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * w.float().double().numpy()
    got = backend.ops.rms_norm(x, w.float(), 1e-5)
    assert got.dtype == x.dtype
    assert (np.abs(got.double().numpy() - expected) <= bound * np.abs(expected) + 1e-7).all()


def test_add_rms_norm_returns_the_normed_and_the_sum(backend, rng):
    x, r = (torch.tensor(rng.standard_normal((3, 8)), dtype=torch.bfloat16) for _ in "xr")
    w = torch.ones(8)
    normed, total = backend.ops.add_rms_norm(x, r, w, 1e-5)
    assert torch.equal(total, (x.double() + r.double()).to(torch.bfloat16))
    assert torch.equal(normed, backend.ops.rms_norm(total, w, 1e-5))


def test_rope_rotates_half_split_pairs(backend, rng, batch_of):
    dim, positions = 8, 64
    angles = np.arange(positions)[:, None] * 10.0 ** -np.arange(dim // 2)
    table = torch.tensor(np.concatenate([np.cos(angles), np.sin(angles)], 1), dtype=torch.float32)
    meta = backend.prepare(batch_of([(9, 3, [1, 2, 3]), (50, 1, list(range(1, 14)))], PAGE))
    q, k = (torch.tensor(rng.standard_normal((4, heads, dim)), dtype=torch.float32) for heads in (4, 2))
    for x, got in zip((q, k), backend.ops.rope(q, k, table, meta), strict=True):
        for row, position in enumerate((9, 10, 11, 50)):
            turn = np.exp(1j * angles[position])
            expected = (x[row, :, :4].numpy() + 1j * x[row, :, 4:].numpy()) * turn
            assert np.abs(got[row].numpy() - np.concatenate([expected.real, expected.imag], 1)).max() < 1e-6


@pytest.mark.parametrize("width", [24, 1536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated(backend, rng, width, dtype):
    x = torch.tensor(rng.standard_normal((70, 2 * width)) * 4).to(getattr(torch, dtype))
    before = x.clone()
    gate, up = np.split(x.double().numpy(), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    got = backend.ops.gated(x, "silu")
    assert got.dtype == x.dtype
    bound = 2**-8 if dtype == "bfloat16" else 1e-6
    assert (np.abs(got.double().numpy() - expected) <= bound * np.abs(expected) + 1e-7).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [24, 57, 1536])
@pytest.mark.parametrize("threads", [1, 3])
def test_small_verbs_give_a_row_the_same_bits_in_any_batch(backend, rng, width, threads):
    x = torch.tensor(rng.standard_normal((131, 2 * width)), dtype=torch.float32)
    w = torch.ones(2 * width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for verb in (lambda t: backend.ops.gated(t, "silu"), lambda t: backend.ops.rms_norm(t, w, 1e-6)):
            whole = verb(x)
            assert torch.equal(whole, torch.cat([verb(row) for row in x.split(1)]))
            assert torch.equal(whole, torch.cat([verb(rows) for rows in x.split(7)]))
    finally:
        torch.set_num_threads(before)


def test_qkv_embed_last_and_logits(backend, rng, batch_of):
    from polyradix.backend.protocol import ParamSpec

    weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((40, 12), (40,)))
    spec = ParamSpec("qkv", "linear", (40, 12), "float32", (24, 8, 8), 0, bias=True)
    packed = backend.pack(spec, lambda part="weight": weight if part == "weight" else bias)
    meta = backend.prepare(batch_of([(0, 3, [1]), (2, 1, [2])], PAGE))
    table = rng.standard_normal((9, 12)).astype(np.float32)
    x = backend.ops.embed(backend.pack(ParamSpec("e", "embed", (9, 12), "float32"), lambda part="weight": table), meta)
    assert np.array_equal(x.numpy(), table[[0, 1, 2, 2]])
    heads = Heads(3, 1, 8)
    q, k, v = backend.ops.qkv(x, packed, heads)
    expected = x.double().numpy() @ weight.T.astype(np.float64) + bias
    assert [tuple(t.shape) for t in (q, k, v)] == [(4, 3, 8), (4, 1, 8), (4, 1, 8)]
    got = np.concatenate([t.reshape(4, -1).numpy() for t in (q, k, v)], 1)
    assert np.abs(got - expected).max() < 1e-5
    assert np.array_equal(backend.ops.last(x, meta).numpy(), table[[2, 2]])
    logits = backend.ops.logits(to_torch(table[:2]).bfloat16(), packed)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 40)
