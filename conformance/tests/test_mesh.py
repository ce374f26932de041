"""The mesh profile: its oracle, its models, and whom it passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from polyradix.backend import null, numpy
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.mesh import NumpyMesh
from polyradix_conformance import oracle_collectives as talk
from polyradix_conformance import tiny
from polyradix_conformance.cases import all_cases
from polyradix_conformance.oracle import EXACT, emulated
from polyradix_conformance.runner import Result, run
from polyradix_conformance.tolerance import K

CASES = [c for c in all_cases() if c.profile == "mesh"]


def test_there_are_cases_of_every_layer_and_number_of_ranks() -> None:
    assert {c.layer for c in CASES} == {"L0", "L1", "L2", "L5"}
    assert {c.needs.tp for c in CASES} == {1, 2, 4}


class Single(NumpyBackend):
    """Cannot be split."""

    def __init__(self) -> None:
        super().__init__("float32", False)
        self.caps = dataclasses.replace(self.caps, max_tp=1)


def of_one_rank(make: Any) -> list[Result]:
    def open(tp: int) -> Any:
        if tp > 1:
            raise Unsupported(f"tp {tp}")
        return make()

    return run(CASES, open)


def test_a_backend_of_one_rank_is_judged_on_one_and_excused_from_the_rest() -> None:
    results = of_one_rank(Single)
    assert all(r.status == ("pass" if "/tp-1/" in r.id else "unsupported") for r in results)


def test_null_passes_nothing() -> None:
    assert {r.status for r in of_one_rank(null.entry.create)} == {"fail", "unsupported"}


class SumsInHops(NumpyMesh):
    """Rounds after every addition, as rings of ranks do: honest."""

    def __init__(self, tp: int) -> None:
        super().__init__("float32", False, tp)
        self.collectives._sum = self._sum  # type: ignore[attr-defined]

    def _sum(self, xs: list[Any]) -> Any:
        total = xs[-1]
        for x in xs[-2::-1]:
            total = total + x
        return total


def test_sums_in_another_order_are_within_the_floor() -> None:
    cases = [c for c in CASES if "/tp-4/" in c.id and ("reduce" in c.id or c.layer == "L5")]
    assert [r for r in run(cases, lambda tp: SumsInHops(tp) if tp > 1 else numpy.entry.create()) if not r.good] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_no_token_of_a_model_is_decided_by_rounding(name: str, dtype: str) -> None:
    truth = tiny.decoding(name, dtype)
    second, best = np.moveaxis(np.sort(truth.logits, axis=-1)[..., -2:], -1, 0)
    assert (best - second > 2 * K * truth.floors).all()
    assert (truth.tokens == truth.logits.argmax(axis=-1)).all()
    assert len(set(truth.tokens.ravel().tolist())) > 5


def test_oracle_by_hand() -> None:
    a, b = np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]])
    for got, want in (
        (talk.all_gather([a, b], 1), [[[1, 2, 10, 20]]] * 2),
        (talk.all_gather([a, b], 0), [[[1, 2], [10, 20]]] * 2),
        (talk.all_to_all([a, b], 1), [[[1, 10]], [[2, 20]]]),
        (talk.reduce_scatter(EXACT, [a, b], 1), [[[11]], [[22]]]),
        (talk.broadcast([a, b], 1), [[[10, 20]]] * 2),
        (talk.permute([a, b, a + 2], [1, 2, 0]), [[[3, 4]], [[1, 2]], [[10, 20]]]),
    ):
        assert [x.tolist() for x in got] == want


def test_oracle_sums_in_two_orders() -> None:
    xs = [np.array([v]) for v in (1.0, 2.0**-24, 2.0**-24)]  # from the start, both are lost
    first, last = (float(talk.all_reduce(p, xs)[0][0]) for p in emulated("float32"))
    assert (first, last) == (1.0, 1 + 2.0**-23)
    assert talk.all_reduce(EXACT, xs)[0] == 1 + 2.0**-23
