"""Every sabotage is killed by a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_conformance.sabotage import SABOTAGES

CASES = all_cases()


def opening(make: Callable[[], Any]) -> Callable[[int], Any]:
    """A backend of one rank, that cannot be split."""

    def open(tp: int) -> Any:
        if tp > 1:
            raise Unsupported(f"tp {tp}")
        return backend

    backend = make()
    return open


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_killed(name: str, record_property: Callable[[str, object], None]) -> None:
    order = sorted(CASES, key=lambda c: c.needs.dtype)  # bfloat16 first: its tolerance is the wider one
    killer = next((r for c in order if not (r := run_case(c, opening(SABOTAGES[name]))).good), None)
    assert killer is not None, f"{name} passes every case"
    assert killer.status == "fail"
    record_property("killed_by", killer.id)
    print(f"{name}: killed by {killer.id}: {killer.detail}")
