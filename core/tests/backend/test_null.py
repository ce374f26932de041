"""The null backend: fast, deterministic, and independent of the batch."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyradix.backend import null
from polyradix.backend.batch import Adjust, HostBatch, SampleBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.null import entry
from polyradix.backend.protocol import KVSpec, Limits, Params, ParamSpec


def read(part: str = "weight") -> Any:
    raise AssertionError("null reads no weights")


def samples(seeds: list[int], positions: list[int]) -> SampleBatch:
    n = len(seeds)
    f = np.ones(n, np.float32)
    return SampleBatch(f, np.zeros(n, np.int32), f, 0 * f, np.array(seeds, np.int32), np.array(positions, np.int32))


def rows(n: int) -> HostBatch:
    i = np.arange(n, dtype=np.int32)
    return HostBatch(i, 0 * i, i, np.arange(n + 1, dtype=np.int32), 0 * i + 1, i[:, None], i, 0 * i - 1)


@pytest.mark.parametrize("async_launch", [False, True])
def test_samples_are_spread_deterministic_and_batch_independent(async_launch: bool) -> None:
    backend = entry.create(async_launch=async_launch)
    backend.pack(ParamSpec("lm_head", "logits", (1000, 8), "bfloat16"), read)
    kv = backend.alloc_kv(KVSpec(2, 1, 8, 16, "bfloat16"), 4)
    run = backend.compile(lambda ops, params, kv, m: (None, kv), Limits(99, 99, 99))

    def tokens(seeds: list[int], positions: list[int]) -> list[int]:
        logits, _ = run(Params({}, []), kv, backend.prepare(rows(len(seeds))))
        out: list[int] = backend.fetch(backend.sample(logits, samples(seeds, positions))).result().tolist()
        return out

    together = tokens([3] * 50, list(range(50)))
    assert together == [tokens([3], [p])[0] for p in range(50)]
    assert len(set(together)) > 40
    assert all(0 <= t < 1000 for t in together)
    assert tokens([-4] * 50, list(range(50))) != together


def test_pages_read_as_zeros_of_the_right_form() -> None:
    backend = entry.create()
    kv = backend.alloc_kv(KVSpec(2, 3, 8, 16, "bfloat16"), 4)
    kv = backend.import_pages(kv, [1], np.ones((2, 2, 1, 16, 3, 8)))
    data = backend.export_pages(backend.copy_pages(kv, [1], [2]), [2, 1, 3]).result()
    assert data.shape == (2, 2, 3, 16, 3, 8)
    assert not data.any()


def test_steps_take_their_time_off_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, go = list[float](), threading.Event()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        go.wait(60)

    monkeypatch.setattr(null, "time", SimpleNamespace(sleep=sleep))
    backend = entry.create(step_time_s=0.05, async_launch=True)
    run = backend.compile(lambda ops, params, kv, m: (None, kv), Limits(9, 9, 9))
    handles = [run(Params({}, []), None, rows(1))[0] for _ in range(3)]
    last = backend.fetch(handles[-1])
    assert not last.done()
    go.set()
    last.result()
    assert slept == [0.05] * 3


def test_masks_and_adjustments_are_declined() -> None:
    backend = entry.create()
    batch = samples([1], [1])
    masked = SampleBatch(
        batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.position, batch.seed
    )
    with pytest.raises(Unsupported, match="mask"):
        backend.sample(None, masked)
    with pytest.raises(Unsupported, match="adjust"):
        backend.sample(None, replace(batch, adjust=Adjust(batch.seed, batch.seed, batch.top_p, batch.min_p)))
