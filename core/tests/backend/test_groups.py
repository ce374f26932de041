"""Caches in groups: their spec, their batches, and a list of layers that share arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyradix.backend import null, numpy
from polyradix.backend.batch import HostBatch, Table
from polyradix.backend.capabilities import Unsupported, check_claimed
from polyradix.backend.layered import each_array, layered
from polyradix.backend.protocol import KVSpec

PLAIN = KVSpec(5, 2, 8, 16, "float32")
SPEC = replace(PLAIN, groups=((2, 4), (0, 1, 3)))


def test_a_layer_has_a_group_and_a_place() -> None:
    assert (SPEC.depth, SPEC.places) == (3, [(1, 0), (1, 1), (0, 0), (1, 2), (0, 1)])
    assert (PLAIN.depth, PLAIN.places) == (5, [(0, i) for i in range(5)])


@pytest.mark.parametrize(
    "groups",
    [((0, 1, 2, 3, 4),), ((0, 1), (2, 3)), ((0, 1), (1, 2, 3, 4)), ((1, 0), (2, 3, 4)), ((0, 1, 2, 3, 4), ()),
     ((0, 1, 2), (3, 4, 5))],
)  # fmt: skip
def test_groups_that_are_none(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"KVSpec\.groups is .*; expected none, or .* two or more of layers 0 to 4"):
        replace(PLAIN, groups=groups)


def test_latent_rows_have_no_groups() -> None:
    with pytest.raises(ValueError, match=r"KVSpec\.groups"):
        KVSpec(2, 1, 8, 16, "float32", "latent", groups=((0,), (1,)))


def test_layers_of_one_place_share_an_array() -> None:
    kv = layered(SPEC, lambda: [np.zeros(1)])
    assert [layer.group for layer in kv] == [group for group, _ in SPEC.places]
    arrays = each_array(kv)
    assert len(arrays) == 3
    assert all(layer[0] is arrays[place][0] for layer, (_, place) in zip(kv, SPEC.places, strict=True))


def test_a_batch_by_group() -> None:
    i = np.arange(2, dtype=np.int32)
    batch = HostBatch(i, i, i, np.arange(3, dtype=np.int32), i + 1, i[:, None], i, 0 * i - 1)
    assert batch.by_group == [batch]
    both = replace(batch, others=(Table(i + 7, i[:, None] + 3),)).by_group
    assert [b.others for b in both] == [(), ()]
    assert [b.slots.tolist() for b in both] == [[0, 1], [7, 8]]
    assert [b.pages.tolist() for b in both] == [[[0], [1]], [[3], [4]]]


@pytest.mark.parametrize("entry", [null.entry, numpy.entry])
def test_pages_hold_the_largest_group(entry: null.NullEntry | numpy.NumpyEntry) -> None:
    backend = entry.create()
    assert backend.kv_page_bytes(SPEC) == 3 * 2 * 16 * 2 * 8 * 4
    assert backend.export_pages(backend.alloc_kv(SPEC, 4), [1, 2]).result().shape == (2, 3, 2, 16, 2, 8)


def test_who_does_not_claim_groups_declines_them() -> None:
    caps = numpy.entry.create().caps
    with pytest.raises(Unsupported, match="feature kv_groups"):
        check_claimed(SPEC, replace(caps, features=caps.features - {"kv_groups"}))
