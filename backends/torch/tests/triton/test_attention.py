"""Shared first keys, interpreted: decode against NumPy float64, and who shares what against plain loops."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted_backend import CPU, Interpreted

from polyradix.backend.batch import I32, HostBatch, Table
from polyradix.backend.layered import LayerKV
from polyradix.backend.protocol import AttnSpec, Heads, Limits
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.triton import attention, prefix
from polyradix_torch.triton.capture import StaticBatch
from polyradix_torch.triton.ops import GpuMeta, TritonOps
from polyradix_torch.triton.upload import upload

GROUPS = ((3, 5), (6, 48), (0, 0), (4, 35))  # (members, keys that they have in common)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys are worth sharing; blocks of them and tiles are small."""
    for module, name, value in (
        (prefix, "LEAST_KEYS", 16),
        (prefix, "LEAST_MEMBERS", 3),
        (prefix, "LEAST_SAVED", 1),
        (prefix, "ITEMS", 5),
        (prefix, "UNIT", 16),
        (attention, "UNIT", 16),
        (prefix, "MEMBERS", 4),
        (attention, "MEMBERS", 4),
    ):
        monkeypatch.setattr(module, name, value)


def batch_of(groups: tuple[tuple[int, int], ...], page: int, seed: int = 0, more: tuple[int, ...] = ()) -> HostBatch:
    """Decode rows in any order: those of each group start with the same whole pages, and go on for 1 to 39 keys, as do
    three sequences that share nothing. `more` are prefills of so many rows. One page in eight is nobody's."""
    rng = np.random.default_rng(seed)
    runs = [(g, common // page) for g, (members, common) in enumerate(groups) for _ in range(members)] + [(-1, 0)] * 3
    runs = [runs[i] for i in rng.permutation(len(runs))]
    new = np.array([1] * len(runs) + list(more))
    lengths = [n * page + int(rng.integers(1, 40)) for _, n in runs] + list(more)
    counts = [-(-n // page) for n in lengths]
    free = iter(rng.permutation(np.arange(1, sum(counts) * 8 // 7 + 200)))
    heads = [[next(free) for _ in range(common // page)] for _, common in groups]
    pages = np.zeros((len(lengths), max(counts)), np.int32)
    for s, count in enumerate(counts):
        g, n = runs[s] if s < len(runs) else (-1, 0)
        pages[s, :count] = [*(heads[g][:n] if n else []), *(next(free) for _ in range(count - n))]
    cu_q = np.cumsum([0, *new]).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, new, strict=True)]).astype(np.int32)
    owner = np.repeat(np.arange(len(lengths)), new)
    slots = (pages[owner, positions // page] * page + positions % page).astype(np.int32)
    none = np.full(len(slots), -1, np.int32)
    return HostBatch(positions, positions, slots, cu_q, np.array(lengths, np.int32), pages, cu_q[1:] - 1, none)


@dataclass(frozen=True)
class Layer:
    """A step's rows, and a cache that is NaN where no sequence has keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv: tuple[torch.Tensor, torch.Tensor]


def slots_of(batch: HostBatch, s: int, page: int) -> I32:
    at = np.arange(batch.kv_len[s])
    out: I32 = batch.pages[s, at // page] * page + at % page
    return out


def layer(batch: HostBatch, heads: Heads, page: int, dtype: torch.dtype) -> Layer:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    q, k, v = (normal(batch.num_tokens, n, heads.dim) for n in (heads.q, heads.kv, heads.kv))
    kv = normal(2, int(batch.pages.max()) + 2, page, heads.kv, heads.dim)
    owned = np.unique(np.concatenate([slots_of(batch, s, page) for s in range(batch.num_seqs)]))
    free = np.setdiff1d(np.arange(kv.shape[1] * page), owned)
    kv.flatten(1, 2)[:, free] = torch.nan
    return Layer(q * 2, k, v, (kv[0], kv[1]))


def expected(batch: HostBatch, x: Layer, a: AttnSpec, page: int) -> np.ndarray:
    """[T,Hq*D] in float64, over keys taken from the pages."""
    q, *kv = (t.double().numpy() for t in (x.q, *x.kv))
    out, group = np.zeros(q.shape), a.heads.q // a.heads.kv
    for s in range(batch.num_seqs):
        rows = slice(batch.cu_q[s], batch.cu_q[s + 1])
        k, v = (np.repeat(c.reshape(-1, *c.shape[2:])[slots_of(batch, s, page)], group, 1) for c in kv)
        score = np.einsum("thd,khd->htk", q[rows], k) * a.scale
        if a.softcap:
            score = a.softcap * np.tanh(score / a.softcap)
        gap = batch.positions[rows][:, None] - np.arange(len(k))
        score = np.where((gap >= 0) & (gap < (a.window or 1 << 30)), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        out[rows] = np.einsum("htk,khd->thd", weight / weight.sum(-1, keepdims=True), v)
    return out.reshape(len(q), -1)


def close(got: torch.Tensor, want: np.ndarray) -> None:
    bound = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
    error = np.abs(got.double().numpy() - want).max(1)
    assert (error <= bound * np.abs(want).max(1)).all(), error


def without(m: GpuMeta) -> GpuMeta:
    return replace(m, paged=replace(m.paged, shared=None))


@pytest.mark.usefixtures("exact", "small")
@pytest.mark.parametrize(
    ("page", "heads", "dtype", "splits", "softcap", "window", "held"),
    [
        (1, Heads(4, 1, 64), torch.float32, 1, None, None, None),
        (16, Heads(7, 1, 80), torch.bfloat16, 3, None, None, None),
        (16, Heads(2, 2, 64), torch.bfloat16, 1, 5.0, None, None),
        (4, Heads(6, 2, 16), torch.float32, 2, None, 20, None),
        (4, Heads(4, 2, 8), torch.float32, 2, None, None, None),
        (16, Heads(4, 1, 64), torch.bfloat16, 2, None, None, torch.float8_e4m3fn),
    ],
)
def test_decode(
    page: int, heads: Heads, dtype: torch.dtype, splits: int, softcap: float | None, window: int | None, held: Any
) -> None:
    """Beside prefills. A window is over all keys, so nothing is read for others. `held` is the cache's dtype."""
    batch = batch_of(GROUPS, page, more=(18,))
    x, spec = layer(batch, heads, page, dtype), AttnSpec(heads, heads.dim**-0.5, window, softcap)
    x = replace(x, kv=(x.kv[0].to(held or dtype), x.kv[1].to(held or dtype)))
    meta, _ = upload(batch, page, attention.tile_rows(heads.dim, x.kv[0].itemsize), splits, CPU)
    assert meta.paged.shared is not None
    got, _ = TritonOps().attend(x.q, x.k, x.v, x.kv, meta, spec)
    want = expected(batch, x, spec, page)
    close(got, want)
    plain, _ = TritonOps().attend(x.q, x.k, x.v, x.kv, without(meta), spec)
    close(plain, want)
    assert torch.equal(got, plain) == (window is not None)


@pytest.mark.usefixtures("exact", "small")
def test_static_batch() -> None:
    """Padding rows, and plans that come and go."""
    page, heads, size = 4, Heads(4, 1, 16), 16
    spec, static = AttnSpec(heads, 0.25), StaticBatch(Limits(64, 40, 96), page, CPU)
    for seed, groups in enumerate(((6, 48), (0, 0), (4, 35)) for _ in "ab"):
        for chosen in (groups, ((2, 40),)):
            batch = batch_of(chosen, page, seed)
            static.load(batch)
            assert static.shared == (chosen is groups)
            x, padding = layer(batch, heads, page, torch.float32), size - batch.num_seqs
            q, k, v = (torch.cat([t, torch.randn(padding, *t.shape[1:])]) for t in (x.q, x.k, x.v))
            got, _ = TritonOps().attend(q, k, v, x.kv, static.meta(size, 2, static.shared), spec)
            close(got[: batch.num_seqs], expected(batch, x, spec, page))


@pytest.mark.usefixtures("exact", "small")
def test_groups_share_what_their_own_tables_share() -> None:
    """The first group's sequences have pages of their own, with the same keys; the second's share theirs."""
    page, heads = 4, Heads(4, 1, 16)
    batch, spec = batch_of(((6, 48),), page), AttnSpec(heads, 0.25)
    x, mine = layer(batch, heads, page, torch.float32), batch.pages > 0
    for part, new in zip(x.kv, (x.k, x.v), strict=True):
        part.flatten(0, 1)[batch.slots] = new
    pages = np.zeros_like(batch.pages)
    pages[mine] = len(x.kv[0]) + np.arange(mine.sum())
    kv = tuple(torch.cat([part, part[batch.pages[mine]]]) for part in x.kv)
    at = np.arange(batch.num_seqs), batch.positions // page
    slots = pages[at] * page + batch.positions % page
    both = replace(batch, pages=pages, slots=slots, others=(Table(batch.slots, batch.pages),))
    static = StaticBatch(Limits(64, batch.num_seqs, 96), page, CPU, groups=2)
    static.load(both)
    assert [bool(plan.any()) for plan in static.plan] == [False, True]
    for meta in (upload(both, page, 64, 2, CPU)[0], static.meta(batch.num_seqs, 2, static.shared)):
        for group in (0, 1):
            got, _ = TritonOps().attend(x.q, x.k, x.v, LayerKV(kv, group), meta, spec)
            close(got, expected(batch, x, spec, page))


def check_plan(batch: HostBatch, single: I32, page: int, room: int) -> bool:
    """Whether there is a plan, which is then seen to give every member each of its shared keys once."""
    flat = prefix.plan(batch, single, page, room)
    if flat is None:
        return False
    shared = prefix.view(torch.from_numpy(flat), room, len(single))
    common, parts, members = (t.tolist() for t in (shared.common, shared.parts, shared.members))
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for first, count, begin, end, part in shared.items.tolist():
        assert count <= attention.MEMBERS
        assert begin % prefix.UNIT == end % prefix.UNIT == 0
        rows = members[first : first + count]
        for row in rows:
            seen.setdefault(row, []).append((part, begin, end))
            pages = batch.pages[single[[row, rows[0]]], : -(-end // page)]
            assert (pages[0] == pages[1]).all()
    for row in range(len(single)):
        found = sorted(seen.pop(row, []))
        assert [p for p, *_ in found] == list(range(parts[row]))
        assert parts[row] <= attention.MOST_PARTS
        edges = [0, *(end for *_, end in found)]
        assert [begin for _, begin, _ in found] == edges[:-1]
        assert edges[-1] == common[row] < batch.kv_len[single[row]]
    assert not seen
    return True


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("page", [1, 4, 16, 64])
def test_plans(page: int) -> None:
    rng = np.random.default_rng(page)
    made = 0
    for seed in range(60):
        groups = tuple((int(rng.integers(0, 24)), int(rng.integers(0, 200))) for _ in range(rng.integers(1, 6)))
        batch = batch_of(groups, page, seed, more=(7,))
        single = np.flatnonzero(np.diff(batch.cu_q) == 1).astype(np.int32)
        wanted = any(members >= 3 and common // page * page // 16 for members, common in groups)
        found = check_plan(batch, single, page, len(single) + seed % 3)
        assert found == wanted
        made += found
    assert 20 <= made < 60


@pytest.mark.usefixtures("small")
def test_what_members_share() -> None:
    """All whole units of the pages that all of them have in common, less the newest key."""
    pages = np.array([[5, 6, 7, 8, 1], [5, 6, 7, 9, 0], [5, 6, 7, 8, 2], [4, 6, 7, 8, 3], [0, 0, 0, 0, 0]], np.int32)
    lengths = np.array([66, 64, 65, 66, 1], np.int32)
    zeros = np.zeros(5, np.int32)
    batch = HostBatch(zeros, lengths - 1, zeros, np.arange(6, dtype=np.int32), lengths, pages, zeros, zeros)
    every = np.arange(5, dtype=np.int32)

    def found(which: I32, changed: HostBatch = batch) -> list[list[int]] | None:
        groups = prefix.groups(changed, which, 16)
        return None if groups is None else [x.tolist() for x in groups]

    assert found(every) == [[0, 1, 2], [3], [48]]
    assert found(every[1:]) is None
    assert found(every[[3, 2, 1, 0]]) == [[1, 2, 3], [3], [48]]
    assert found(every, replace(batch, kv_len=np.array([66, 48, 65, 66, 1], np.int32))) == [[0, 1, 2], [3], [32]]
    assert found(every, replace(batch, pages=np.tile(pages[4], (5, 1)))) is None


def test_sharing_that_does_not_pay() -> None:
    """Too few members, too few keys, too little saved."""
    sizes = [((3, 4096),), ((64, 240),), ((4, 512),), ((32, 512),), ((4, 5504),)]
    batches = [batch_of(groups, 16) for groups in sizes]
    assert [check_plan(b, np.arange(b.num_seqs, dtype=np.int32), 16, b.num_seqs) for b in batches] == [
        False, False, False, False, True,
    ]  # fmt: skip


ALONE = [
    c
    for c in all_cases()
    if re.match(
        r"L1/attend/(decode/peaked/|(decode/softcap-50|heads-mqa)/bfloat16|(mixed/normal|page-1)/float32)", c.id
    )
]


@pytest.mark.usefixtures("exact", "small")
@pytest.mark.parametrize("case", ALONE, ids=lambda c: c.id)
def test_conformance(case: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode row with keys enough is a group of its own."""
    monkeypatch.setattr(prefix, "LEAST_MEMBERS", 1)
    monkeypatch.setattr(prefix, "LEAST_SAVED", 0)
    plans, plan = [], prefix.plan

    def kept(*args: object) -> I32 | None:
        plans.append(plan(*args))  # type: ignore[arg-type]
        return plans[-1]

    monkeypatch.setattr(prefix, "plan", kept)
    backend = Interpreted(2)
    result = run_case(case, lambda tp: backend)  # type: ignore[arg-type]
    assert result.status == "pass", result.detail
    assert any(p is not None for p in plans)
