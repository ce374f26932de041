"""Latent caches with shared first rows, interpreted: against NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted_backend import CPU
from test_attention import GROUPS, batch_of, close, slots_of, small

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import LatentSpec, LatentWeights, Limits
from polyradix_torch.triton import latent, latent_prefix, prefix
from polyradix_torch.triton.capture import StaticBatch
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.upload import upload

__all__ = ["small"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worth sharing."""
    monkeypatch.setattr(prefix, "LEAST_SAVED_LATENT", 1)


def normal(dtype: torch.dtype, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(a: LatentSpec, dtype: torch.dtype) -> LatentWeights:
    angles = torch.arange(200.0)[:, None] / 50 ** (torch.arange(a.rope // 2) / (a.rope // 2))
    up = normal(dtype, 2, a.heads, a.nope + a.v, a.rank)
    return LatentWeights(torch.ones(a.rank), up / a.rank**0.5, torch.cat([angles.cos(), angles.sin()], 1))


def expected(
    batch: HostBatch, q: torch.Tensor, cache: torch.Tensor, w: LatentWeights, a: LatentSpec, page: int
) -> np.ndarray:
    """[T,H*v] in float64, of a cache into which the new rows were written."""
    asked, held, table, up = (x.double().numpy() for x in (q, cache.flatten(0, 2), w.table, w.up))
    asked, out = asked.reshape(len(q), a.heads, -1), np.zeros((len(q), a.heads, a.v))
    for s in range(batch.num_seqs):
        mine, rows = slice(batch.cu_q[s], batch.cu_q[s + 1]), held[slots_of(batch, s, page)]
        at = batch.positions[mine]
        cos, sin = np.split(table[at][:, None], 2, -1)
        x, y = np.split(asked[mine, :, a.nope :], 2, -1)
        turned = np.concatenate([x * cos - y * sin, y * cos + x * sin], -1)
        query = np.concatenate([np.einsum("thn,hnr->thr", asked[mine, :, : a.nope], up[:, : a.nope]), turned], -1)
        warm = a.scale * (1 + a.attn_scale * np.log(1 + at // a.floor_scale))
        score = np.einsum("thr,kr->htk", query, rows) * warm[None, :, None]
        score = np.where(at[:, None] >= np.arange(len(rows)), score, -np.inf)
        p = np.exp(score - score.max(-1, keepdims=True))
        out[mine] = np.einsum("htk,kr,hvr->thv", p / p.sum(-1, keepdims=True), rows[:, : a.rank], up[:, a.nope :])
    return out.reshape(len(q), -1)


@pytest.mark.usefixtures("exact", "small")
@pytest.mark.parametrize(
    ("page", "heads", "dtype", "splits", "warm"),
    [(4, 2, torch.float32, 1, 0.0), (16, 3, torch.bfloat16, 3, 0.3), (1, 17, torch.float32, 2, 0.0)],
)
def test_decode(
    page: int, heads: int, dtype: torch.dtype, splits: int, warm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a prefill that is absorbed and one that is expanded. Pages that nobody has hold NaN."""
    monkeypatch.setattr(latent, "FEW", 4)
    monkeypatch.setattr(latent_prefix, "MEMBERS", 4)
    monkeypatch.setattr(latent_prefix, "UNIT", 16)
    calls: list[object] = []
    launch = latent_prefix.launch
    monkeypatch.setattr(latent_prefix, "launch", lambda *x: calls.append(launch(*x)))  # type: ignore[func-returns-value]
    batch = batch_of(GROUPS if heads < 4 else GROUPS[3:], page, more=(3, 18) if warm else ())
    a = LatentSpec(heads, 24, 16, 8, 12, 0.2, 1e-6, warm, 20)
    w, size = weights(a, dtype), a.rank + a.rope
    q, c = normal(dtype, 3, batch.num_tokens, heads * 24), normal(dtype, 4, batch.num_tokens, size)
    cache = normal(dtype, 5, int(batch.pages.max()) + 2, page, 1, size)
    owned = np.concatenate([slots_of(batch, s, page) for s in range(batch.num_seqs)])
    free = torch.ones(len(cache) * page, dtype=torch.bool).index_fill_(0, torch.from_numpy(owned).long(), False)
    cache.view(-1, size)[free] = torch.nan
    meta = upload(batch, page, 16, splits, CPU, absorb=True)[0]
    assert meta.paged.shared is not None
    got, _ = TritonOps().attend_latent(q, c, (cache,), meta, w, a)
    close(got, expected(batch, q, cache, w, a, page))
    assert len(calls) == 1


@pytest.mark.usefixtures("exact", "small")
@pytest.mark.parametrize(("page", "dtype", "room"), [(4, torch.float32, 1 << 14), (16, torch.bfloat16, 1 << 28)])
def test_prefill(page: int, dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones that share their first keys are expanded, and these once for all; heads may have to take turns."""
    for name, value in {
        "FEW": 10,
        "FEW_SHARED": 4,
        "ROOM": room,
        "PREFILL": {2: (16, 8, 16, 16), 4: (16, 8, 16, 16)},
    }.items():
        monkeypatch.setattr(latent, name, value)
    batch, a = widened(batch_of(((4, 48), (3, 19)), page), page), LatentSpec(2, 16, 16, 16, 16, 0.2, 1e-6)
    w, size = weights(a, dtype), a.rank + a.rope
    q, c = normal(dtype, 3, batch.num_tokens, a.heads * 32), normal(dtype, 4, batch.num_tokens, size)
    cache = normal(dtype, 5, int(batch.pages.max()) + 2, page, 1, size)
    meta = upload(batch, page, 16, 2, CPU, absorb=True)[0]
    shared = meta.latent.starts[:, 0]
    assert 0 < int((shared > 0).sum()) < batch.num_seqs
    expanded = meta.paged.tiles[:, 0].unique().long()
    assert meta.latent.keys < sum(int(batch.kv_len[s]) for s in expanded)
    assert int(shared[expanded].min()) == 0, "long ones that share nothing too"
    got, _ = TritonOps().attend_latent(q, c, (cache,), meta, w, a)
    close(got, expected(batch, q, cache, w, a, page))


def widened(batch: HostBatch, page: int) -> HostBatch:
    """Some of the keys that no other sequence has are new, not the newest alone."""
    uses, rng = np.bincount(batch.pages.ravel()), np.random.default_rng(4)
    free = [
        int(n) - page * int((uses[pages[: n // page]] > 1).sum())
        for n, pages in zip(batch.kv_len, batch.pages, strict=True)
    ]
    new = [int(rng.integers(1, n + 1)) for n in free]
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(batch.kv_len, new, strict=True)]).astype(np.int32)
    owner, cu_q = np.repeat(np.arange(len(new)), new), np.cumsum([0, *new]).astype(np.int32)
    slots = batch.pages[owner, positions // page] * page + positions % page
    return HostBatch(positions, positions, slots, cu_q, batch.kv_len, batch.pages, cu_q[1:] - 1, 0 * slots - 1)


@pytest.mark.usefixtures("exact", "small")
def test_padding_rows() -> None:
    """Rows beyond a batch change none of it."""
    page, size, dtype = 4, 16, torch.float32
    a = LatentSpec(2, 16, 8, 8, 8, 0.3, 1e-6)
    batch, static = batch_of(((6, 48), (4, 35)), page), StaticBatch(Limits(64, 40, 96), page, CPU, latent=True)
    static.load(batch)
    assert static.shared
    w, n = weights(a, dtype), batch.num_seqs
    q, c = normal(dtype, 3, size, 2 * 16), normal(dtype, 4, size, a.rank + a.rope)
    cache = normal(dtype, 5, int(batch.pages.max()) + 2, page, 1, a.rank + a.rope)
    got, _ = TritonOps().attend_latent(q, c, (cache,), static.meta(size, 2, True), w, a)
    close(got[:n], expected(batch, q[:n], cache, w, a, page))
    assert n < size
