from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from polyradix.backend.batch import SampleBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import KVSpec, Limits, Params, ParamSpec
from polyradix.backend.sampling import sample_row
from polyradix_torch import to_numpy, to_torch

LIMITS = Limits(16, 4, 64)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
def test_values_survive_the_way_to_torch_and_back(dtype):
    x = np.arange(-12, 12).reshape(4, 6).astype(dtype)[:, ::2]
    x.flags.writeable = False
    there = to_torch(x)
    back = to_numpy(there)
    assert back.dtype == x.dtype
    assert np.array_equal(back, x)
    there += 1
    assert x[0, 0] == dtype(-12)


def test_pack_copies_what_it_reads(backend):
    source = np.ones((3, 2), np.float32)
    weight = backend.pack(ParamSpec("e", "embed", (3, 2), "float32"), lambda part="weight": source)
    source[:] = 5
    assert weight.sum() == 6


@pytest.mark.parametrize(
    "changed", [{"page_size": 7}, {"head_dim": 1024}, {"dtype": "float16"}], ids=["page_size", "head_dim", "dtype"]
)
def test_a_cache_that_is_not_claimed_is_unsupported(backend, changed):
    with pytest.raises(Unsupported, match=str(next(iter(changed.values())))):
        backend.alloc_kv(replace(KVSpec(1, 1, 8, 16, "float32"), **changed), 2)


def test_unknown_dtypes_are_unsupported(backend):
    with pytest.raises(Unsupported, match="float16"):
        backend.pack(ParamSpec("e", "embed", (1, 1), "float16"), lambda part="weight": np.ones((1, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_are_copied_exported_and_imported(backend, rng, dtype):
    spec = KVSpec(layers=3, kv_heads=2, head_dim=8, page_size=4, dtype=dtype)
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    kv = backend.alloc_kv(spec, 10)
    assert sum(c.nbytes for layer in kv for c in layer) == 10 * backend.kv_page_bytes(spec)
    assert not backend.export_pages(kv, range(10)).result().astype(np.float32).any()
    data = rng.standard_normal((2, 3, 4, 4, 2, 8)).astype(kind)
    kv = backend.import_pages(kv, [7, 2, 9, 4], data)
    out = backend.export_pages(kv, [7, 2, 9, 4]).result()
    assert out.dtype == kind
    assert np.array_equal(out, data)
    assert np.array_equal(to_numpy(kv[1][0][2]), data[0, 1, 1])
    assert np.array_equal(to_numpy(kv[2][1][9]), data[1, 2, 2])
    kv = backend.copy_pages(kv, [7, 9], [1, 7])
    assert np.array_equal(backend.export_pages(kv, [1, 7, 9]).result(), data[:, :, [0, 2, 2]])


def test_an_export_is_not_changed_by_later_writes(backend):
    kv = backend.alloc_kv(KVSpec(1, 1, 4, 4, "float32"), 3)
    out = backend.export_pages(kv, [1]).result()
    backend.import_pages(kv, [1], np.ones_like(out))
    assert not out.any()


def test_tokens_come_from_the_previous_samples(backend, batch_of):
    batch = batch_of([(5, 2, [1, 2]), (3, 1, [3])], 4, prev=[-1, 1, 0])
    prev = torch.tensor([11, 22], dtype=torch.int32)
    assert backend.prepare(batch, prev).tokens.tolist() == [5, 22, 11]
    with pytest.raises(ValueError, match="prev is None"):
        backend.prepare(batch)


def test_compile_runs_the_step_on_the_ops(backend, batch_of):
    def step(ops, params, kv, m):
        return ops.embed(params.top["e"], m), kv

    run = backend.compile(step, LIMITS)
    out, kv = run(Params({"e": torch.arange(8.0)[:, None]}, []), [1], backend.prepare(batch_of([(2, 3, [1, 2])], 4)))
    assert out[:, 0].tolist() == [2, 3, 4]
    assert kv == [1]


def sampling(rows, rng, **changed):
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changed
    i32 = lambda x: np.full(rows, x, np.int32)  # noqa: E731
    f32 = lambda x: np.full(rows, x, np.float32)  # noqa: E731
    return SampleBatch(
        temperature=f32(values["temperature"]),
        top_k=i32(values["top_k"]),
        top_p=f32(values["top_p"]),
        min_p=f32(values["min_p"]),
        seed=rng.integers(-(2**31), 2**31, rows).astype(np.int32),
        position=np.arange(rows, dtype=np.int32),
    )


def test_greedy_takes_the_lowest_id_of_equals(backend, rng):
    logits = rng.standard_normal((6, 1000)).astype(np.float32)
    logits[:, 700] = logits[:, 31] = 9
    got = backend.sample(torch.from_numpy(logits), sampling(6, rng))
    assert got.dtype == torch.int32
    assert got.tolist() == [31] * 6


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5, "top_p": 0.8}, {"temperature": 1.0, "min_p": 0.1}],
)
def test_sampling_follows_the_definition(backend, rng, changed):
    logits = (rng.standard_normal((40, 300)) * 3).astype(np.float32)
    batch = sampling(40, rng, **changed)
    got = backend.fetch(backend.sample(torch.from_numpy(logits), batch)).result()
    assert got.dtype == np.int32
    assert got.tolist() == [sample_row(logits[s], batch, s) for s in range(40)]


def test_logprobs(backend, rng):
    logits = rng.standard_normal((5, 50)).astype(np.float32) * 3
    tokens = np.array([3, 0, 49, 7, 7], np.int32)
    got = backend.logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), 4)
    wide = logits.astype(np.float64)
    logs = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    order = np.argsort(-logs, axis=1)[:, :4]
    chosen, ids, values = (backend.fetch(x).result() for x in (got.chosen, got.ids, got.values))
    assert (chosen.dtype, ids.dtype, values.dtype) == (np.float32, np.int32, np.float32)
    assert np.array_equal(ids, order)
    assert np.abs(values - np.take_along_axis(logs, order, 1)).max() < 1e-5
    assert np.abs(chosen - logs[range(5), tokens]).max() < 1e-5
    none = backend.logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), 0)
    assert backend.fetch(none.ids).result().shape == (5, 0)
