"""The serving cases: whom they pass, what they see, and that they do not depend on one page size."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from polyradix.backend import null, numpy
from polyradix.backend.capabilities import FEATURES, Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyOps
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run

CASES = [c for c in all_cases() if c.layer == "L4"]
SUBJECTS = {c.id.split("/")[1] for c in CASES}


def statuses(backend: Any, dtype: str = "float32", subjects: set[str] = SUBJECTS) -> dict[str, str]:
    """By subject."""
    cases = [c for c in CASES if c.id.endswith(dtype) and c.id.split("/")[1] in subjects]
    return {r.id.split("/")[1]: r.status for r in run(cases, lambda tp: backend)}


def claiming(backend: NumpyBackend, **changes: Any) -> NumpyBackend:
    backend.caps = dataclasses.replace(backend.caps, **changes)
    return backend


def test_null_fails_every_case() -> None:
    for dtype in ("float32", "bfloat16"):
        assert statuses(null.entry.create(), dtype) == dict.fromkeys(SUBJECTS, "fail")


@pytest.mark.parametrize("page", [1, 32, 128])
def test_numpy_passes_at_other_page_sizes(page: int) -> None:
    backend, subjects = claiming(numpy.entry.create(), page_sizes=(page,)), {"hit", "preempted", "radix"}
    assert statuses(backend, subjects=subjects) == dict.fromkeys(subjects, "pass")


def test_without_logprobs_tokens_are_compared() -> None:
    class Silent(NumpyBackend):
        def logprobs(self, logits: Any, tokens: Any, top: int) -> Any:
            raise Unsupported("logprobs")

    backend = claiming(Silent("float32", False), features=FEATURES - {"logprobs"})
    assert statuses(backend) == dict.fromkeys(SUBJECTS, "pass")


def test_a_backend_without_masks_or_a_dtype_is_unsupported_there() -> None:
    class Unmasked(NumpyBackend):
        def sample(self, logits: Any, batch: Any) -> Any:
            if batch.mask is not None:
                raise Unsupported("mask")
            return super().sample(logits, batch)

    backend = claiming(Unmasked("float32", False), features=FEATURES - {"mask"}, dtypes=frozenset({"float32"}))
    assert statuses(backend) == dict.fromkeys(SUBJECTS, "pass") | {"masked": "unsupported"}
    assert statuses(backend, "bfloat16") == dict.fromkeys(SUBJECTS, "unsupported")


def _reversed(x: Any) -> Any:
    return np.ascontiguousarray(x[:, ::-1])


class Varying(NumpyOps):
    """An honest backend whose sums are in an order that depends on the number of rows."""

    def _product(self, x: Any, w: Any) -> Any:
        out = super()._product(x, w) if len(x) % 2 else _reversed(x.astype(self._wide)) @ _reversed(w.value).T
        return out if len(x) % 2 or w.bias is None else out + w.bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backend_that_varies_passes_unless_it_claims_not_to(dtype: str) -> None:
    backend = NumpyBackend("float32", False)
    backend.ops = Varying(backend._wide, backend._store)
    assert statuses(backend, dtype, {"hit"}) == {"hit": "fail"}
    claiming(backend, batch_invariant=False)
    assert statuses(backend, dtype) == dict.fromkeys(SUBJECTS, "pass")


class NoiseByRow(NumpyBackend):
    def sample(self, logits: Any, batch: Any) -> Any:
        return super().sample(logits, dataclasses.replace(batch, seed=np.arange(len(batch.seed), dtype=np.int32)))


class PreviousIgnored(NumpyBackend):
    def prepare(self, batch: Any, prev: Any = None) -> Any:
        return super().prepare(dataclasses.replace(batch, from_prev=np.full_like(batch.from_prev, -1)), prev)


class MaskOfFirstRow(NumpyBackend):
    def sample(self, logits: Any, batch: Any) -> Any:
        mask = batch.mask if batch.mask is None else np.repeat(batch.mask[:1], len(batch.mask), axis=0)
        return super().sample(logits, dataclasses.replace(batch, mask=mask))


class NoiseByStep(NumpyBackend):
    """The position of the noise is a count of steps, as in an engine that keeps its generator on the device."""

    steps = 0

    def sample(self, logits: Any, batch: Any) -> Any:
        self.steps += 1
        return super().sample(logits, dataclasses.replace(batch, position=np.full_like(batch.position, self.steps)))


class ChunkForgets(NumpyBackend):
    """A chunk that goes on from others reads scratch in place of their pages."""

    def prepare(self, batch: Any, prev: Any = None) -> Any:
        pages, size = batch.pages.copy(), 16
        for s in np.flatnonzero(np.diff(batch.cu_q) > 1):
            pages[s, : batch.positions[batch.cu_q[s]] // size] = 0
        return super().prepare(dataclasses.replace(batch, pages=pages), prev)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (NoiseByRow, {"hit", "chunked", "preempted", "reordered", "radix", "cancelled"}),
        (NoiseByStep, {"hit", "reordered"}),
        (PreviousIgnored, {"overlapped"}),
        (MaskOfFirstRow, {"masked"}),
        (ChunkForgets, {"hit", "chunked"}),
    ],
)
def test_a_defect_in_serving_is_seen(kind: type[NumpyBackend], seen: set[str]) -> None:
    assert statuses(kind("float32", False), subjects=seen) == dict.fromkeys(seen, "fail")
