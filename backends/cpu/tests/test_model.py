"""The whole graph on the CPU backend: right, and the same bits whatever the batch. Runs on the kernels asked for."""

from __future__ import annotations

import numpy as np
import pytest

from polyradix.backend.registry import check_drift
from polyradix_cpu import entry


def test_the_contract_is_kept():
    backend = entry.create()
    check_drift("cpu", backend)
    memory = backend.memory()
    assert 0 < memory.free <= memory.total
    assert any(note.startswith("kernels: ") for note in backend.caps.notes)


def test_logits_agree_with_the_definition(model, dtype, prompt):
    from polyradix.backend.numpy import entry as numpy_entry

    expected = model(numpy_entry.create(compute="float64")).feed({"a": prompt, "b": prompt[:9]})
    got = model().feed({"a": prompt, "b": prompt[:9]})
    assert got.dtype == np.float32
    spread = expected.std()
    assert np.abs(got - expected).max() < spread * (1e-5 if dtype == "float32" else 0.06)


def test_whole_chunked_and_decoded_prefill_give_the_same_bits(model, prompt):
    whole = model().feed({"a": prompt})
    chunked, decoded = model(), model()
    for piece in np.split(prompt, [1, 17, 18, 40, 64]):
        last = chunked.feed({"a": piece})
    assert np.array_equal(last, whole)
    for token in prompt:
        last = decoded.feed({"a": np.array([token])})
    assert np.array_equal(last, whole)


@pytest.mark.parametrize("company", [2, 15])
def test_company_does_not_change_a_row(model, prompt, company):
    alone, together = model(), model()
    alone.feed({"a": prompt[:50]})
    others = {f"o{i}": prompt[i : i + 1 + 3 * (i % 4)] for i in range(company)}
    together.feed({**others, "a": prompt[:50]})
    for token in prompt[50:54]:
        expected = alone.feed({"a": np.array([token])})
        mixed = {name: tokens[:1] for name, tokens in others.items()}
        got = together.feed({**mixed, "a": np.array([token])})
        assert np.array_equal(got[-1], expected[0])


def test_a_moved_prefix_gives_the_same_bits(model, prompt):
    """Pages exported from one cache, imported into another at other places, and copied there."""
    first = model()
    first.feed({"a": prompt[:48]})
    expected = first.feed({"a": prompt[48:]})
    data = first.backend.export_pages(first.kv, first.owned["a"][:3]).result()
    second = model()
    pages = [2, 31, 30]
    second.free = [p for p in second.free if p not in (*pages, 9)]
    second.kv = second.backend.import_pages(second.kv, pages, data)
    second.kv = second.backend.copy_pages(second.kv, [31], [9])
    second.owned["a"], second.done["a"] = [2, 9, 30], 48
    assert np.array_equal(second.feed({"a": prompt[48:]}), expected)
