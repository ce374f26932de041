"""Every sabotage is killed by a must-pass case, and what is no defect is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from polyradix.backend import numpy
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyOps
from polyradix.backend.protocol import Backend
from polyradix_conformance import mustpass
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run
from polyradix_conformance.sabotage import Sabotage, all_sabotages, killer
from polyradix_conformance.supervisor import Job, supervise

CASES = [c for c in all_cases() if any(c.id in mustpass.load(profile) for profile in mustpass.profiles())]
ALL = {s.name: s for s in all_sabotages()}
DRIFT = {"VerbMissing", "VerbUnknown", "ParameterRequired"}  # the registry's error, not a wrong answer


@dataclass(frozen=True)
class SabotageJob(Job):
    """Opens a sabotage by its name, in the supervisor's child too."""

    def open(self, tp: int) -> Backend:
        return {s.name: s for s in all_sabotages()}[self.backend].open(tp)


def test_there_are_enough() -> None:
    assert len(ALL) >= 40
    assert all(s.text.endswith(".") for s in ALL.values())


@pytest.mark.parametrize("name", [s.name for s in ALL.values() if not s.process])
def test_sabotage_is_killed(name: str, record_property: Callable[[str, object], None]) -> None:
    result = killer(ALL[name], CASES)
    assert result is not None, f"{name} passes every case: {ALL[name].text}"
    assert result.status == ("error" if name in DRIFT else "fail"), result.detail
    record_property("killed_by", result.id)
    print(f"{name} killed by {result.id}: {result.detail}")


@pytest.mark.parametrize(("name", "detail"), [("Hang", "timed out after 10 s"), ("Crash", "7")])
def test_a_supervisor_survives(name: str, detail: str) -> None:
    ids = ["L1/add/normal/float32", "L1/attend/whole/normal/float32", "L1/gated/normal/float32"]
    _, results = supervise(SabotageJob(name), ids, timeout=10)
    assert [r.status for r in results] == ["pass", "error", "pass"]
    assert detail in results[1].detail


def test_a_right_backend_is_not_killed() -> None:
    right = Sabotage("Right", "", lambda tp: numpy.entry.create(tp=tp), ())
    assert killer(right, [c for c in CASES if c.id.startswith(("L0/", "L1/rope", "L1/all_reduce", "L2/meta"))]) is None


def test_wide_activations_are_no_defect() -> None:
    """Fused kernels do not round between verbs; errors only shrink."""

    def open(tp: int) -> Backend:
        backend = NumpyBackend("float32", False)
        backend.ops = NumpyOps(backend._wide, dict.fromkeys(backend._store, backend._wide))
        return backend

    rough = [c for c in CASES if c.needs.dtype == "bfloat16" and c.needs.tp == 1]
    cases = [c for c in rough if c.layer == "L2" or (c.layer == "L1" and "/normal/" in c.id)]
    assert cases
    assert [r for r in run(cases, open) if not r.good] == []
