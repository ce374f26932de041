"""Decodes planned on the device lie where the host says."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import Limits
from polyradix_conformance.inputs import Part, Ragged
from polyradix_rocm.plan import Part as Planned
from polyradix_rocm.plan import plan, planned
from polyradix_torch.triton.capture import StaticBatch
from polyradix_torch.triton.upload import upload

CPU = torch.device("cpu")


def same(mine: Planned, host: Planned) -> None:
    for name in ("cu_q", "indptr", "ones"):
        assert getattr(mine, name)[: len(getattr(host, name))].tolist() == getattr(host, name).tolist(), name
    assert mine.slots[: len(host.slots)].tolist() == host.slots.tolist()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("page", [1, 4, 16])
def test_on_the_device(page: int) -> None:
    ragged = Ragged((1, 4, 5, 23, 8), page)
    batch = ragged.batch([Part(s, n - 1, n) for s, n in enumerate(ragged.lengths)])
    host = plan(batch, page, "cpu")
    assert host.single is host.whole
    assert host.many is None
    meta, _ = upload(batch, page, 64, 1, CPU)
    eager = planned(meta.paged, page, 24)
    same(eager.whole, host.whole)
    assert len(eager.whole.slots) == 5 * 24
    static = StaticBatch(Limits(64, 8, 24), page, CPU)
    static.load(batch)
    captured = planned(static.meta(8, 1).paged, page, 24).whole
    same(captured, host.whole)
    assert captured.indptr[5:].tolist() == [41, 42, 43, 44]
    assert captured.slots[41:44].tolist() == [0, 0, 0], "padding rows have one key, on scratch page 0"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("page", [1, 4, 16])
def test_keys_before_the_window_are_left_out(page: int) -> None:
    """On the device those of whole pages; on the host those that were given back."""
    ragged, window = Ragged((1, 4, 5, 23, 8), page), 5
    batch = ragged.batch([Part(s, n - 1, n) for s, n in enumerate(ragged.lengths)])
    meta, _ = upload(batch, page, 64, 1, CPU)
    behind = (batch.kv_len[:, None] - window) // page > np.arange(batch.pages.shape[1])
    host = plan(replace(batch, pages=np.where(behind, 0, batch.pages)), page, "cpu")
    same(planned(meta.paged, page, 24, window).whole, host.whole)
    slots = [ragged.slots(Part(s, max(0, n - window) // page * page, n)) for s, n in enumerate(ragged.lengths)]
    assert host.whole.slots.tolist() == list(chain(*slots))


def test_on_the_host() -> None:
    """A batch of both kinds is cut into its decodes and the rest."""
    page, ragged = 4, Ragged((1, 9, 6, 13), 4)
    parts = [Part(0, 0, 1), Part(1, 4, 9), Part(2, 5, 6), Part(3, 10, 13)]
    batch = ragged.batch(parts)
    made = plan(batch, page, "cpu")
    assert made.single is not None
    assert made.many is not None
    for part, seqs in ((made.whole, (0, 1, 2, 3)), (made.single, (0, 2)), (made.many, (1, 3))):
        rows = [list(range(batch.cu_q[s], batch.cu_q[s + 1])) for s in seqs]
        slots = [ragged.slots(Part(s, 0, int(batch.kv_len[s]))).tolist() for s in seqs]
        assert part.slots.tolist() == list(chain(*slots))
        assert part.indptr.diff().tolist() == [len(x) for x in slots]
        assert part.cu_q.diff().tolist() == [len(x) for x in rows]
        assert part.longest == (max(map(len, rows)), max(map(len, slots)))
        assert part.rows is None if len(seqs) == 4 else part.rows.tolist() == list(chain(*rows))
