"""Which keys attention is shown, of caches in groups."""

from __future__ import annotations

import numpy as np
import pytest

from polyradix.backend.batch import HostBatch, Table
from polyradix_npu.meta import held

PAGE = 128


def of(new: list[int], kv_len: list[int], pages: list[list[int]]) -> HostBatch:
    """A batch whose first group has all its pages, and whose second has `pages`."""
    cu_q, table = np.cumsum([0, *new]).astype(np.int32), np.array(pages, np.int32)
    ids = np.arange(cu_q[-1], dtype=np.int32)
    other = Table(ids + 7, table)
    return HostBatch(
        ids, ids, ids, cu_q, np.array(kv_len, np.int32), np.ones_like(table), cu_q[1:] - 1, ids * 0 - 1, others=(other,)
    )


def test_pages_given_back_are_left_out_with_their_keys() -> None:
    batch = of([1, 2, 130], [400, 100, 300], [[0, 0, 5, 6], [9, 0, 0, 0], [0, 3, 4, 0]])
    full, windowed = held(batch, PAGE)
    np.testing.assert_array_equal(full.kv_len, [400, 100, 300])
    np.testing.assert_array_equal(windowed.kv_len, [400 - 256, 100, 300 - 128])
    assert windowed.pages[0].tolist() == [5, 6]
    assert windowed.pages[1, 0] == 9
    assert windowed.pages[2].tolist() == [3, 4]
    np.testing.assert_array_equal(windowed.slots, np.arange(133) + 7)


@pytest.mark.parametrize("new", [1, 200, 300])
def test_the_batchs_own_keys_are_never_left_out(new: int) -> None:
    """As when scratch page 0 is all that there is, before the server is ready."""
    _, windowed = held(of([new], [300], [[0, 0, 0]]), PAGE)
    assert new <= windowed.kv_len[0] <= 300
    assert windowed.kv_len[0] <= windowed.pages.shape[1] * PAGE
