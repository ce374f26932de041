"""The relations notice what they are for, draw the same each time, and new examples when told to."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import strategies as st

from polyradix_conformance.cases import all_cases
from polyradix_conformance.cases.metamorphic import Plan, plans
from polyradix_conformance.rig import Mismatch
from polyradix_conformance.runner import run_case
from polyradix_conformance.sabotage import all_sabotages
from polyradix_conformance.search import FUZZ, search

SABOTAGES = {s.name: s for s in all_sabotages()}
CASES = {c.id: c for c in all_cases() if "/meta/" in c.id}
NOTICED = {
    "L1/meta/scaled_values/float32": "ValuesSaturate",
    "L1/meta/shift/float32": "MinPOfLogits",
    "L1/meta/sampled_in_any_order/float32": "NoiseOfRow",
    "L1/meta/wide_window/float32": "WindowShort",
    "L1/meta/high_softcap/float32": "SoftcapLeftOn",
    "L1/meta/masked/float32": "NoiseOfIndex",
    "L2/meta/permute/float32": "RopeFromRow",
    "L2/meta/rename/float32": "PagesSorted",
    "L2/meta/split/float32": "ProductVariant",
    "L2/meta/interleave/float32": "RowsRemembered",
    "L2/meta/offload/bfloat16": "NothingRounded",
    "L2/meta/copies/float32": "CopySorted",
    "L2/meta/round_trip/float32": "ImportSorted",
    "L2/meta/any_order/float32": "ExportLate",
}


@pytest.fixture(autouse=True)
def no_fuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FUZZ, raising=False)


def test_every_relation_has_a_defect_that_it_must_notice() -> None:
    assert {id.rpartition("/")[0] for id in NOTICED} == {id.rpartition("/")[0] for id in CASES}


@pytest.mark.parametrize("id", NOTICED)
def test_a_relation_alone_notices(id: str) -> None:
    result = run_case(CASES[id], cache(SABOTAGES[NOTICED[id]].open))
    assert result.status == "fail"
    assert "; with {" in result.detail


@pytest.mark.parametrize("seq", range(3))
def test_plans_run_every_sequence_in_order(seq: int) -> None:
    lengths = (1, 9, 4)

    def whole(plan: Plan) -> None:
        mine = [p for parts in plan for p in parts if p.seq == seq]
        assert [p.start for p in mine] == [0, *(p.stop for p in mine[:-1])]
        assert mine[-1].stop == lengths[seq]
        assert all(p.start < p.stop for p in mine)
        assert all(len({p.seq for p in parts}) == len(parts) > 0 for parts in plan)

    search(whole, 50, plan=plans(lengths))


def drawn(examples: int) -> list[int]:
    seen: list[int] = []
    search(lambda n: seen.append(n), examples, n=st.integers(0, 2**62))
    return seen


def test_draws_are_the_same_in_every_run() -> None:
    assert drawn(10) == drawn(10)
    assert len(drawn(10)) == 10


def test_fuzz_draws_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUZZ, "30")
    first = drawn(10)
    assert len(first) == 30
    assert first != drawn(10)


def test_fuzz_goes_on_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUZZ, "1s")
    assert len(drawn(1)) > 40


@pytest.mark.parametrize("text", ["0", "x", "-3", "1.5", "60 s", "0s"])
def test_fuzz_must_be_a_count(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUZZ, text)
    with pytest.raises(ValueError, match=f"{FUZZ} is '{text}'; expected a number of examples, or of seconds"):
        drawn(1)


def test_a_failing_example_is_named() -> None:
    def small(n: int) -> None:
        if n > 5:
            raise Mismatch("too large")

    with pytest.raises(Mismatch, match=r"too large; with \{'n': \d+\}"):
        search(small, 50, n=st.integers(0, 100))
