"""The compiled step: what it says to other ranks, and that the cache is updated in place."""

from __future__ import annotations

import re

import jax
import jax.export
import numpy as np
import pytest

from polyradix.backend.protocol import Limits
from polyradix.graph.dense import make_step
from polyradix_tpu.batch import TILE, Shape
from polyradix_tpu.kernels import xla

SHAPES = [Shape(4, 4, 8, 1), Shape(64, 4, 8, TILE)]


def compiled(model, shape: Shape):
    vector = jax.ShapeDtypeStruct((shape.length,), np.int32)
    return model.program.lower(model.tree, model.kv.arrays, vector, shape).compile()


def collectives(text: str) -> dict[str, int]:
    names = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tp", [2, 4])
def test_two_sums_a_layer_and_one_gather_of_logits(model, tp, shape):
    m = model(tp)
    assert collectives(compiled(m, shape).as_text()) == {"all-reduce": 2 * m.spec.layers, "all-gather": 1}


def test_one_rank_says_nothing(model):
    assert collectives(compiled(model(1), SHAPES[0]).as_text()) == {}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tp", [1, 4])
def test_the_cache_is_updated_in_place(model, tp, shape):
    m = model(tp, pages=2000)
    size = sum(x.nbytes for x in m.kv.arrays) // tp
    memory = compiled(m, shape).memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 20


@pytest.mark.parametrize("tp", [1, 4])
def test_the_step_lowers_for_tpus_without_one(model, tp):
    m, shape = model(tp), SHAPES[1]
    vector = jax.ShapeDtypeStruct((shape.length,), np.int32)
    exported = jax.export.export(m.program, platforms=["tpu"])(m.tree, m.kv.arrays, vector, shape)
    assert (exported.platforms, exported.nr_devices) == (("tpu",), tp)


def test_parameters_are_not_donated_and_the_old_cache_is(model):
    m = model()
    old = m.kv.arrays
    vector = np.zeros(SHAPES[0].length, np.int32)
    _, new = m.program(m.tree, old, vector, SHAPES[0])
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in [*new, *jax.tree.leaves(m.tree)])


@pytest.mark.parametrize("tp", [1, 4])
def test_a_cache_wider_than_its_heads_is_exported_without_the_rest(model, batch, tp):
    """As on a TPU, whose last axis is a multiple of 128."""
    exports = []
    for lanes in (1, 128):
        m = model(tp)
        m.backend._lanes = lanes
        spec = m.spec.kv_spec(16, "float32")
        kv = m.backend.alloc_kv(spec, 8)
        assert kv.arrays[0].shape[3] == max(lanes, 32)
        assert m.backend.kv_page_bytes(spec) * 8 * tp == sum(x.nbytes for x in kv.arrays)
        run = m.backend.compile(make_step(m.spec), Limits(64, 4, 64))
        logits, kv = run(m.params, kv, m.backend.prepare(batch(40, 3)))
        kv = m.backend.copy_pages(kv, [1], [7])
        kv = m.backend.import_pages(kv, [5], m.backend.export_pages(kv, [2]).result())
        exports.append((m.backend.fetch(logits).result(), m.backend.export_pages(kv, range(1, 8)).result()))
    for narrow, wide in zip(*exports, strict=True):
        np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("lengths", [(40, 3, 17), (1, 1, 1)])
def test_tiles_that_take_turns_give_the_same(model, batch, monkeypatch, lengths):
    def logits() -> np.ndarray:
        m = model(pages=16)
        run = m.backend.compile(make_step(m.spec), Limits(64, 4, 64))
        return m.backend.fetch(run(m.params, m.kv, m.backend.prepare(batch(*lengths)))[0]).result()

    together = logits()
    for budget in (1, 500_000):
        monkeypatch.setattr(xla, "BUDGET", budget)
        np.testing.assert_allclose(logits(), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warm", [True, False])
def test_warm_compiles_every_bucket_at_the_first_step(model, batch, warm):
    m = model(warm=warm)
    run = m.backend.compile(make_step(m.spec), Limits(32, 2, 40))
    _, kv = run(m.params, m.kv, m.backend.prepare(batch(3)))
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *args, **kwargs: events.append(name))
    for lengths in ((1,), (30,), (1, 1), (20, 3)):
        _, kv = run(m.params, kv, m.backend.prepare(batch(*lengths)))
    assert any("backend_compile" in name for name in events) != warm


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([33], "num_tokens 33; expected at most 32"),
        ([1, 1, 1], "num_seqs 3; expected at most 2"),
        ([25], "kv_len 25; expected at most 24"),
    ],
)
def test_a_batch_beyond_the_limits_is_named(model, batch, lengths, message):
    m = model()
    run = m.backend.compile(make_step(m.spec), Limits(32, 2, 24))
    with pytest.raises(ValueError, match=message):
        run(m.params, m.kv, m.backend.prepare(batch(*lengths)))


def test_samples_that_are_not_there_are_named(model, batch):
    made = batch(1)
    made.from_prev[:] = 0
    with pytest.raises(ValueError, match="prev is None"):
        model().backend.prepare(made)
