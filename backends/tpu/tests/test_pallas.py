"""The Pallas kernels on conformance cases, interpreted: right as they are, seen to be wrong when made so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_tpu import entry

CHOSEN = (
    "L1/attend/decode/window-7/float32",
    "L1/attend/mixed/softcap/bfloat16",
    "L1/moe/sigmoid/bfloat16",
    "L1/attend_latent/shape-kernel-tiles/bfloat16",
    "L1/attend_sparse/top-1/float32",
)
CASES = [c for c in all_cases() if c.id in CHOSEN]  # few: the interpreter is slow


@pytest.fixture(scope="module")
def backend():
    return entry.create(platform="cpu", kernels="pallas")


def test_the_notes_say_so(backend):
    assert "kernels: Pallas, interpreted" in backend.caps.notes
    assert "kernels: XLA" in entry.create(platform="cpu").caps.notes


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case, backend):
    result = run_case(case, lambda tp: backend)
    assert result.status == "pass", result.detail


def test_a_window_one_too_wide_is_seen(backend):
    wrong = entry.create(platform="cpu", kernels="pallas")
    kernels = wrong.ops._kernels
    wide = lambda q, kv, m, a: kernels.attend(q, kv, m, replace(a, window=a.window and a.window + 1))  # noqa: E731
    wrong.ops._kernels = replace(kernels, attend=wide)
    (case,) = (c for c in CASES if c.id == CHOSEN[0])
    assert run_case(case, lambda tp: wrong).status == "fail"
