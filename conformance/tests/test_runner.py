"""Running cases: right backends pass, wrong ones fail, and a backend that hangs or dies takes no other case with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from polyradix.backend import numpy
from polyradix.backend.capabilities import FEATURES, Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix_conformance import supervisor
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import Result, run, run_case
from polyradix_conformance.supervisor import Job, Refused, supervise

CASES = all_cases()
DENSE = [c for c in CASES if c.profile == "dense"]
L0 = [c.id for c in DENSE if c.layer == "L0"]
MEMORY = [id for id in L0 if id.startswith("L0/memory/")]
Install = Callable[[str], None]


def by_id(id: str) -> Case:
    return next(c for c in CASES if c.id == id)


def claiming(**changes: Any) -> Callable[[int], Any]:
    """A NumPy backend with other claims, and nothing behind them."""
    backend = numpy.entry.create()
    backend.caps = dataclasses.replace(backend.caps, **changes)
    return lambda tp: backend


def bad(results: list[Result]) -> list[Result]:
    return [r for r in results if r.status != "pass"]


def test_numpy_passes_when_launches_are_asynchronous() -> None:
    cases = [c for c in DENSE if c.layer in ("L0", "L2") or c.id.startswith(("L1/sample", "L1/logprobs", "L1/add"))]
    assert bad(run(cases, Job("numpy", options={"async_launch": True}).open)) == []


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("L1/attend/whole/softcap/float32", {"features": FEATURES - {"softcap"}}),
        ("L1/sample/mask/float32", {"features": FEATURES - {"mask"}}),
    ],
)
def test_an_answer_that_is_not_claimed_is_a_failure(id: str, changes: dict[str, Any]) -> None:
    result = run_case(by_id(id), claiming(**changes))
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
    result = run_case(by_id(id), claiming(**changes))
    assert result.status == "unsupported"
    assert "the backend offers" in result.detail


def test_what_is_claimed_must_not_be_declined() -> None:
    class Coy(NumpyBackend):
        def sample(self, logits: Any, batch: Any) -> Any:
            raise Unsupported("sampling")

    result = run_case(by_id("L1/sample/greedy/float32"), lambda tp: Coy("float32", False))
    assert result.status == "fail"
    assert "claimed, and declined: unsupported: sampling" in result.detail


def test_an_exception_is_an_error_that_says_where() -> None:
    class Raises(NumpyBackend):
        def prepare(self, batch: Any, prev: Any = None) -> Any:
            raise RuntimeError("the device is gone")

    result = run_case(by_id("L1/embed/float32"), lambda tp: Raises("float32", False))
    assert result.status == "error"
    assert result.detail.startswith("RuntimeError: the device is gone [test_runner.py:")


def test_ids_are_unique_and_name_their_layer() -> None:
    assert len({c.id for c in CASES}) == len(CASES)
    assert {c.layer for c in CASES} <= {"L0", "L1", "L2", "L3", "L4", "L5"}


def test_a_child_gives_the_results_that_the_runner_gives() -> None:
    seen: list[Result] = []
    claims, results = supervise(Job("numpy"), L0, 60, seen.append)
    assert [r.id for r in results] == L0
    assert bad(results) == []
    assert seen == results
    assert claims.caps["page_sizes"][0] == 16
    json.dumps(dataclasses.asdict(claims))


def test_shares_run_at_the_same_time_and_keep_the_order(vendor: Install, tmp_path: Any) -> None:
    here = tmp_path / "processes"
    here.mkdir()
    vendor(f"""
    def memory(self):
        os.makedirs({str(here)!r} + f"/{{os.getpid()}}", exist_ok=True)
        while len(os.listdir({str(here)!r})) < 2:
            time.sleep(0.05)
        return super(Vendor, self).memory()
    Vendor.memory = memory
    """)
    ids, seen = [MEMORY[0], MEMORY[1], *L0[:3]], list[Result]()
    _, results = supervise(Job("vendor"), ids, 30, seen.append, shares=2)
    assert [r.id for r in results] == ids
    assert sorted(r.id for r in seen) == sorted(ids)
    assert {r.status for r in results[2:]} == {"pass"}


def test_a_share_that_is_refused_ends_the_others(vendor: Install, tmp_path: Any) -> None:
    vendor(f"""
    Vendor.memory = lambda self: time.sleep(600)
    def create(self):
        try:
            os.mkdir({str(tmp_path / "first")!r})
        except FileExistsError:
            time.sleep(1)
            raise
        return Vendor()
    Entry.create = create
    """)
    with pytest.raises(Refused, match="FileExistsError"):
        supervise(Job("vendor"), [MEMORY[0], MEMORY[1]], 300, shares=2)


@pytest.mark.parametrize(
    ("act", "detail"),
    [
        ("time.sleep(600)", "timed out after 10 s"),
        ("os._exit(7)", "the process exited with 7"),
        ("os._exit(0)", "the process exited with 0"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process died of Segmentation fault"),
        ("os.fork() == 0 and time.sleep(600) or os._exit(8)", "the process exited with 8"),
    ],
)
def test_a_case_that_hangs_or_dies_is_an_error_and_the_others_run(vendor: Install, act: str, detail: str) -> None:
    vendor(f"""
    def memory(self):
        {act}
    Vendor.memory = memory
    """)
    _, results = supervise(Job("vendor"), [*L0[:2], MEMORY[0], *L0[-2:]], 10)
    assert [r.status for r in results] == ["pass", "pass", "error", "pass", "pass"]
    assert results[2].detail == detail


def test_after_three_lost_processes_the_rest_is_not_run(vendor: Install) -> None:
    vendor("Vendor.memory = lambda self: os._exit(7)")
    ids = [MEMORY[0], MEMORY[1], L0[0], MEMORY[0], L0[1], MEMORY[1]]
    _, results = supervise(Job("vendor"), ids, 30)
    assert [r.status for r in results] == ["error", "error", "pass", "error", "not_run", "not_run"]
    assert results[-1].detail == "not run: 3 processes were lost"


def test_a_backend_that_opens_only_once_leaves_the_rest_not_run(vendor: Install, tmp_path: Any) -> None:
    vendor(f"""
    Vendor.memory = lambda self: os._exit(7)
    def create(self):
        os.mkdir({str(tmp_path / "opened")!r})
        return Vendor()
    Entry.create = create
    """)
    _, results = supervise(Job("vendor"), [MEMORY[0], L0[0]], 30)
    assert [r.status for r in results] == ["error", "not_run"]
    assert results[1].detail.startswith("not run: FileExistsError")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('no driver')", "device 'vendor' cannot be used: ImportError: no driver"),
        ("sys.exit(3)", "while it was being opened, the process exited with 3"),
        ("Entry.create = lambda self: 1 / 0", "ZeroDivisionError: division by zero"),
        ("Entry.create = lambda self: os.abort()", "while it was being opened, the process died of Aborted"),
        ("Entry.create = lambda self: time.sleep(600)", "while it was being opened, timed out after 4 s"),
        ("Entry.protocol = (9, 0)", "backend 'vendor' was written for protocol (9, 0)"),
        ("del Entry.create", "AttributeError"),
        ("Vendor.reboot = lambda self: None", "Backend.reboot is unknown"),
    ],
)
def test_a_backend_that_cannot_be_opened_is_refused(
    vendor: Install, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    if "sleep" in source:
        monkeypatch.setattr(supervisor, "OPEN_S", 4.0)
    vendor(source)
    with pytest.raises(Refused, match=message.replace("(", r"\(").replace(")", r"\)")):
        supervise(Job("vendor"), L0, 1)
