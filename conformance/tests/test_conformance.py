"""The suite itself: right backends pass, wrong ones fail, and no run of nothing passes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyradix.backend import null, numpy
from polyradix.backend.capabilities import FEATURES, Capabilities, Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.cli import main
from polyradix_conformance.runner import Result, run, run_case, verdict
from polyradix_conformance.sabotage import SABOTAGES

CASES = all_cases()


def failures(results: list[Result]) -> list[Result]:
    return [r for r in results if not r.good]


def opening(make: Callable[[], Any]) -> Callable[[int], Any]:
    """A backend of one rank, that cannot be split."""

    def open(tp: int) -> Any:
        if tp > 1:
            raise Unsupported(f"tp {tp}")
        return backend

    backend = make()
    return open


def claiming(**changes: Any) -> NumpyBackend:
    """A NumPy backend with other claims, and nothing behind them."""
    backend = numpy.entry.create()
    backend.caps = dataclasses.replace(backend.caps, **changes)
    return backend


def test_numpy_passes_every_case() -> None:
    results = run(CASES, opening(numpy.entry.create))
    assert failures(results) == []
    assert len(results) > 200
    assert {r.status for r in results} == {"pass"}


def test_numpy_passes_when_launches_are_asynchronous() -> None:
    cases = [c for c in CASES if c.layer != "L1" or c.id.startswith(("L1/sample", "L1/logprobs", "L1/add"))]
    assert failures(run(cases, opening(lambda: numpy.entry.create(async_launch=True)))) == []


def test_null_fails_every_case_but_those_on_claims_and_zeros() -> None:
    results = run(CASES, opening(null.entry.create))
    assert verdict(results) is not None
    passed = {r.id.split("/")[1] for r in results if r.status == "pass"}
    assert passed <= {"methods", "capabilities", "memory", "page_bytes", "zeroed"}


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_killed(name: str, record_property: Callable[[str, object], None]) -> None:
    order = sorted(CASES, key=lambda c: c.needs.dtype)  # bfloat16 first: its tolerance is the wider one
    killer = next((r for c in order if not (r := run_case(c, opening(SABOTAGES[name]))).good), None)
    assert killer is not None, f"{name} passes every case"
    assert killer.status == "fail"
    record_property("killed_by", killer.id)
    print(f"{name}: killed by {killer.id}: {killer.detail}")


def by_id(id: str) -> Case:
    return next(c for c in CASES if c.id == id)


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("L1/attend/whole/softcap/float32", {"features": FEATURES - {"softcap"}}),
        ("L1/sample/mask/float32", {"features": FEATURES - {"mask"}}),
    ],
)
def test_an_answer_that_is_not_claimed_is_a_failure(id: str, changes: dict[str, Any]) -> None:
    result = run_case(by_id(id), opening(lambda: claiming(**changes)))
    assert result.status == "fail"
    assert "answered instead of raising Unsupported" in result.detail


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("L1/add/normal/bfloat16", {"dtypes": frozenset({"float32"})}),
        ("L1/attend/dim-128/float32", {"max_head_dim": 64}),
        ("L1/attend/page-8/float32", {"page_sizes": (16,)}),
    ],
)
def test_what_is_not_claimed_and_declined_is_unsupported(id: str, changes: dict[str, Any]) -> None:
    result = run_case(by_id(id), opening(lambda: claiming(**changes)))
    assert result.status == "unsupported"
    assert "the backend offers" in result.detail


def test_what_is_claimed_must_not_be_declined() -> None:
    class Coy(NumpyBackend):
        def sample(self, logits: Any, batch: Any) -> Any:
            raise Unsupported("sampling")

    result = run_case(by_id("L1/sample/greedy/float32"), opening(lambda: Coy("float32", False)))
    assert result.status == "fail"
    assert "claimed, and declined: unsupported: sampling" in result.detail


def test_a_backend_that_declines_everything_is_not_conformant() -> None:
    class Decline(NumpyBackend):
        def __init__(self) -> None:
            super().__init__("float32", False)
            self.caps = Capabilities("decline", "none", frozenset(), (16,), 0)

        def pack(self, spec: Any, read: Any) -> Any:
            raise Unsupported("everything")

    results = run([c for c in CASES if c.layer == "L1"], opening(Decline))
    assert {r.status for r in results} == {"unsupported"}
    assert verdict(results) == "no case passed"


def test_a_crash_is_an_error_and_not_a_pass() -> None:
    class Crash(NumpyBackend):
        def prepare(self, batch: Any, prev: Any = None) -> Any:
            raise RuntimeError("the device is gone")

    result = run_case(by_id("L1/embed/float32"), opening(lambda: Crash("float32", False)))
    assert (result.status, result.detail) == ("error", "RuntimeError: the device is gone")


def test_ids_are_unique_and_name_their_layer() -> None:
    assert len({c.id for c in CASES}) == len(CASES)
    assert {c.layer for c in CASES} == {"L0", "L1", "L2"}


def test_command_run_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert main(["run", "--backend", "numpy", "--only", "L1/add/", "-o", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["partial"] is True
    assert report["backend"] == "numpy"
    assert report["counts"] == {"pass": 8}
    assert all(0 < c["error_to_floor"] <= 3 for c in report["cases"])
    assert "[partial]: conformant (8 pass)" in capsys.readouterr().out


def test_command_fails_for_null_for_nothing_and_for_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--backend", "null", "--only", "L1/embed"]) == 1
    assert "fail        L1/embed/float32" in capsys.readouterr().out
    assert main(["run", "--backend", "numpy", "--only", "no such case"]) == 1
    assert "no case was run" in capsys.readouterr().out
    assert main(["run", "--backend", "nope"]) == 2
    assert "device is 'nope'" in capsys.readouterr().err
    assert main(["run", "--backend", "numpy", "--profile", "sparse"]) == 2
    assert "profile is 'sparse'; expected one of: dense" in capsys.readouterr().err


def test_command_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == [c.id for c in CASES]
    assert main(["list", "--only", "no such case"]) == 1
