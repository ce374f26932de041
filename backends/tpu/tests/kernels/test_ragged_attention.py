from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_tpu.kernels import ragged_paged_attention as ragged
from polyradix_tpu.kernels import xla
from polyradix_tpu.kernels.ragged_paged_attention.softmax import Softmax
from polyradix_tpu.kernels.ragged_paged_attention.stream import Stream

CHECKED = pltpu.InterpretParams(detect_races=True)
EAGER = pltpu.InterpretParams(dma_execution_mode="eager")
BOUND = {"bfloat16": 2e-2, "float32": 5e-6}
PLAIN = {"window": None, "softcap": None}
ALL = {"window": 21, "softcap": 2.0}


def lengths(page: int) -> list[int]:
    return [1, page - 1, page, page + 1, 53]


def check(result, dtype):
    np.testing.assert_allclose(*result, rtol=0, atol=BOUND[dtype])


DECODES = [
    (Heads(2, 2, 64), 8, "float32", PLAIN, False),
    (Heads(8, 2, 128), 16, "bfloat16", PLAIN, False),
    (Heads(8, 2, 128), 16, "bfloat16", ALL, True),
    (Heads(7, 1, 80), 16, "bfloat16", ALL, False),
    (Heads(8, 1, 256), 32, "float32", {"window": 5, "softcap": None}, True),
    (Heads(24, 12, 64), 8, "float32", PLAIN, False),  # 24 rows of a slot do not divide 128 lanes
]


@pytest.mark.parametrize(("heads", "page", "dtype", "options", "sink"), DECODES)
def test_decode(case, races, heads, page, dtype, options, sink):
    c = case([1] * 5, lengths(page), heads, page, dtype)
    sinks = np.linspace(-1, 3, heads.q, dtype=np.float32) if sink else None
    check(c.attend(ragged.attend, AttnSpec(heads, heads.dim**-0.5, **options, sinks=sinks), interpret=CHECKED), dtype)
    assert not races()


MIXES = [
    (Heads(2, 2, 64), 8, "float32", PLAIN, False),
    (Heads(8, 2, 128), 16, "bfloat16", PLAIN, False),
    (Heads(7, 1, 80), 16, "bfloat16", ALL, True),
    (Heads(8, 1, 256), 32, "float32", {"window": 5, "softcap": None}, True),
]


@pytest.mark.parametrize(("heads", "page", "dtype", "options", "sink"), MIXES)
def test_mix_of_decodes_and_chunks(case, races, heads, page, dtype, options, sink):
    c = case([1, 7, 16, 1, 37], [*lengths(page)[:1], page - 1, page + 16, 53, 211], heads, page, dtype)
    sinks = np.linspace(-1, 3, heads.q, dtype=np.float32) if sink else None
    check(c.attend(ragged.attend, AttnSpec(heads, heads.dim**-0.5, **options, sinks=sinks), interpret=CHECKED), dtype)
    assert not races()


def test_two_cores_share_the_items(case, races, blocks):
    blocks["flat"]["cores"] = blocks["split"]["cores"] = 2
    heads = Heads(4, 2, 64)
    c = case([1, 20, 5, 1], [33, 53, 21, 17], heads, 16, "float32")
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check(c.attend(ragged.attend, AttnSpec(heads, 0.125), interpret=params), "float32")
    assert not races()


@pytest.mark.parametrize("waits", [True, False])
def test_copies_carried_out_at_once(case, capfd, monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(Stream, "wait", lambda *_: None)
    heads = Heads(4, 2, 64)
    c = case([1, 1], [33, 53], heads, 16, "float32")
    check(c.attend(ragged.attend, AttnSpec(heads, 0.125), interpret=EAGER), "float32")
    assert ("Semaphore" not in capfd.readouterr().out) == waits  # that is not zero at the end


@pytest.mark.parametrize("attend", [xla.attend, partial(ragged.attend, interpret=CHECKED)])
def test_a_cache_wider_than_the_heads(case, attend):
    heads = Heads(4, 2, 40)
    c = case([1, 1], [17, 20], heads, 16, "float32", width=64)
    check(c.attend(attend, AttnSpec(heads, 0.2)), "float32")


def test_a_block_read_before_it_is_there_is_a_race(case, races, monkeypatch):
    wait, add, pending = Stream.wait, Softmax.add, []

    def late(*args):
        add(*args)
        wait(*pending.pop())

    monkeypatch.setattr(Stream, "wait", lambda *args: pending.append(args))
    monkeypatch.setattr(Softmax, "add", late)
    heads = Heads(4, 2, 64)
    c = case([1, 1], [33, 53], heads, 16, "float32")
    try:
        c.attend(ragged.attend, AttnSpec(heads, 0.125), interpret=CHECKED)
    except RuntimeError as error:  # from JAX 0.12 on
        assert "RACE DETECTED" in str(error)  # noqa: PT017
    else:
        assert races()
