"""How a batch reaches the device: flat pages, tiles, one upload, and the static batch that graphs read."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch, Table
from polyradix.backend.protocol import AttnSpec, Heads, Limits
from polyradix_conformance.inputs import Part, Ragged
from polyradix_torch.triton import latent
from polyradix_torch.triton.capture import FIELDS, StaticBatch, sizes, splits_for
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.upload import flat_pages, tiles, upload

CPU = torch.device("cpu")
PAGE = 4
RAGGED = Ragged((1, 4, 5, 23, 8), PAGE)
MIXED = [Part(0, 0, 1), Part(1, 3, 4), Part(2, 0, 5), Part(3, 2, 23), Part(4, 6, 8)]
DECODE = [Part(s, n - 1, n) for s, n in enumerate(RAGGED.lengths)]


def page_list(batch: HostBatch) -> list[list[int]]:
    return [row[: -(-n // PAGE)].tolist() for row, n in zip(batch.pages, batch.kv_len, strict=True)]


@pytest.mark.parametrize("parts", [MIXED, DECODE, DECODE[3:]])
def test_flat_pages(parts: list[Part]) -> None:
    batch = RAGGED.batch(parts)
    flat, starts = flat_pages(batch, PAGE)
    assert flat.tolist() == list(itertools.chain(*page_list(batch)))
    assert [flat[s] for s in starts] == [pages[0] for pages in page_list(batch)]


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_every_row_has_one_place(rows: int) -> None:
    """In a tile, or alone in its sequence."""
    batch = RAGGED.batch(MIXED)
    meta, source = upload(batch, PAGE, rows, 3, CPU)
    covered = [int(batch.cu_q[s]) for s in meta.paged.single]
    found = tiles(np.where(np.diff(batch.cu_q) > 1, np.diff(batch.cu_q), 0), rows)
    for s, first in found:
        start, stop = batch.cu_q[s], batch.cu_q[s + 1]
        covered += range(start + first, min(start + first + rows, stop))
    assert sorted(covered) == list(range(batch.num_tokens))
    assert meta.paged.tiles.tolist() == found.tolist()
    assert meta.paged.splits == 3
    for name in ("tokens", "positions", "slots", "last"):
        assert getattr(meta, name).tolist() == getattr(batch, name).tolist()
    for name in ("cu_q", "kv_len"):
        assert getattr(meta.paged, name).tolist() == getattr(batch, name).tolist()
    assert source.tolist() == batch.from_prev.tolist()


@pytest.mark.parametrize("few", [1, 3, 4, 64])
def test_every_row_is_absorbed_or_expanded(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "FEW", few)
    batch = RAGGED.batch(MIXED)
    m = upload(batch, PAGE, 2, 3, CPU, absorb=True)[0]
    tokens, placed = m.latent.tokens.tolist(), list(range(len(m.paged.single)))
    behind = len(placed)
    for s, first, place in m.latent.few.tolist():
        place += behind
        rows = range(batch.cu_q[s] + first, min(batch.cu_q[s] + first + latent.TOKENS, batch.cu_q[s + 1]))
        assert tokens[place : place + len(rows)] == list(rows)
        placed += range(place, place + len(rows))
    assert sorted(placed) == list(range(len(tokens)))
    for s, first in m.paged.tiles.tolist():
        tokens += range(batch.cu_q[s] + first, min(batch.cu_q[s] + first + 2, batch.cu_q[s + 1]))
    assert sorted(tokens) == list(range(batch.num_tokens))
    at = 0
    for s, first, end, place in m.latent.runs.tolist():
        assert (first, end, place, m.latent.starts[s].tolist()) == (0, batch.kv_len[s], at, [0, 0, at])
        at += int(batch.kv_len[s])
    assert (at, set(m.paged.tiles[:, 0].tolist())) == (m.latent.keys, set(m.latent.runs[:, 0].tolist()))


def test_static_batch_holds_the_batch_and_nothing_of_the_one_before() -> None:
    static = StaticBatch(Limits(64, 8, 24), PAGE, CPU)
    for parts in (DECODE, DECODE[1:3], DECODE[3:]):
        batch = RAGGED.batch(parts)
        static.load(batch)
        n, given = batch.num_seqs, [batch.tokens, batch.positions, batch.slots, batch.from_prev, batch.kv_len]
        flat = static.buffer[len(FIELDS) * static.most :]
        for name, values in zip(FIELDS, given, strict=False):
            assert static.fields[name][:n].tolist() == values.tolist(), name
        for s, pages in enumerate(page_list(batch)):
            start = int(static.fields["page_start"][s])
            assert flat[start : start + len(pages)].tolist() == pages
        padding = {name: set(x[n:].tolist()) for name, x in static.fields.items()}
        (at,) = padding.pop("page_start")
        assert padding == {"tokens": {0}, "positions": {0}, "slots": {0}, "from_prev": {-1}, "kv_len": {1}}
        assert int(flat[at]) == 0


def test_static_batch_has_room_for_the_largest() -> None:
    limits = Limits(64, 3, 23)
    ragged = Ragged((23, 23, 23), PAGE)
    static = StaticBatch(limits, PAGE, CPU)
    static.load(ragged.batch([Part(s, 22, 23) for s in range(3)]))
    assert static.meta(3, 1).paged.pages[-2:].tolist() == [int(ragged.pages[2][-1]), 0]


def grouped(batch: HostBatch) -> HostBatch:
    """With a second group, whose first page of every sequence but those of one page is given back."""
    pages = np.where(batch.pages > 0, batch.pages + RAGGED.num_pages, 0)
    pages[batch.kv_len > PAGE, 0] = 0
    return replace(batch, others=(Table(batch.slots + RAGGED.num_pages * PAGE, pages.astype(np.int32)),))


@pytest.mark.parametrize("parts", [MIXED, DECODE, DECODE[3:]])
def test_each_group_has_its_slots_and_pages(parts: list[Part]) -> None:
    batch = grouped(RAGGED.batch(parts))
    metas = [upload(batch, PAGE, 8, 2, CPU)[0]]
    if parts is not MIXED:
        static = StaticBatch(Limits(64, 8, 24), PAGE, CPU, groups=2)
        static.load(batch)
        metas.append(static.meta(8, 2))
    for meta in metas:
        for mine, host in zip((meta, *meta.others), batch.by_group, strict=True):
            assert mine.slots[: len(host.slots)].tolist() == host.slots.tolist()
            for start, pages in zip(mine.paged.page_start.tolist(), page_list(host), strict=False):
                assert mine.paged.pages[start : start + len(pages)].tolist() == pages
            for at in mine.paged.page_start[batch.num_seqs :].tolist():
                assert int(mine.paged.pages[at]) == 0
            assert not mine.slots[batch.num_tokens :].any()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("splits", [1, 3])
def test_padding_rows_do_no_harm(splits: int) -> None:
    """They write to page 0 alone, and the other rows get the bits that they get without them."""
    batch, heads, count = RAGGED.batch(DECODE), Heads(4, 2, 64), 8
    static = StaticBatch(Limits(64, count, 24), PAGE, CPU)
    static.load(batch)
    random = torch.Generator().manual_seed(3)
    kv = tuple(torch.randn(RAGGED.num_pages, PAGE, heads.kv, heads.dim, generator=random) for _ in "kv")
    q, k, v = (torch.randn(count, n, heads.dim, generator=random) for n in (heads.q, heads.kv, heads.kv))
    spec, kept, n = AttnSpec(heads, 0.125), [x.clone() for x in kv], batch.num_seqs
    padded, _ = TritonOps().attend(q, k, v, kv, static.meta(count, splits), spec)
    alone, _ = TritonOps().attend(q[:n], k[:n], v[:n], kept, upload(batch, PAGE, 64, splits, CPU)[0], spec)
    assert torch.equal(padded[:n], alone)
    for mine, other in zip(kv, kept, strict=True):
        assert torch.equal(mine[1:], other[1:])
        assert not torch.equal(mine[0], other[0])


def test_sizes() -> None:
    assert [sizes(n) for n in (1, 2, 3, 8, 20)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 16, 20]]
    for most in range(1, 300):
        ladder = sizes(most)
        assert ladder[-1] == most
        assert all(0 < b - a <= 8 for a, b in itertools.pairwise(ladder))


def test_splits_keep_the_processors_busy() -> None:
    assert [splits_for(n, 132) for n in (1, 8, 64, 264, 10**6)] == [32, 32, 4, 1, 1]
    assert np.all([splits_for(n, 132) * n <= 2 * 132 for n in range(1, 265)])
