from __future__ import annotations

import numpy as np
import pytest

from polyradix.backend.protocol import Limits
from polyradix_tpu.batch import TILE, Ladder, pack, unpack

LENGTHS = [(1,), (1, 1, 1), (37,), (1, 16, 17, 1, 40), (2,) * 9]


@pytest.mark.parametrize("growth", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_vector_holds_the_batch_and_zeros(batch, growth, lengths):
    made = batch(*lengths)
    shape = Ladder(growth).shape(made)
    m = unpack(pack(made, shape), shape)
    for name in ("tokens", "positions", "slots", "kv_len", "last", "pages"):
        held, value = getattr(m, name), getattr(made, name)
        inside = tuple(map(slice, value.shape))
        assert (held[inside] == value).all(), name
        assert held.sum() == value.sum(), name
    assert (m.cu_q == np.pad(made.cu_q, (0, shape.seqs - made.num_seqs), mode="edge")).all()
    assert m.num_seqs == [len(lengths)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_row_is_in_a_tile_of_its_sequence(batch, lengths):
    made = batch(*lengths)
    shape = Ladder(2).shape(made)
    m = unpack(pack(made, shape), shape)
    assert shape.tile == (1 if set(lengths) == {1} else TILE)
    tile, offset = np.divmod(m.where[: made.num_tokens], shape.tile)
    assert (m.tile_row[tile] + offset == np.arange(made.num_tokens)).all()
    assert (m.tile_seq[tile] == np.repeat(np.arange(len(lengths)), lengths)).all()
    assert tile.max() < shape.tiles


def test_all_shapes_holds_that_of_every_batch_within_the_limits(batch):
    ladder, limits = Ladder(4), Limits(96, 6, 90)
    known = list(ladder.all_shapes(limits, page_size=16))
    assert len(known) == len(set(known))
    for seqs in range(1, 7):
        for longest in (1, 2, 15, 90):
            if seqs * longest <= limits.max_tokens:
                assert ladder.shape(batch(*[longest] * seqs)) in known
