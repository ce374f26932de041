"""pytest plugin: the suite as a vendor's own tests, one per case.

    @pytest.mark.conformance(backend="mychip", profile="dense")  # emulate=True and options={...} are allowed
    def test_conformance(conformance_case):
        conformance_case.check()

The cases run in pytest's own process, so that a debugger can be used; `conform run` is the one that survives hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from polyradix.backend.protocol import Backend
    from polyradix_conformance.cases import Case
    from polyradix_conformance.supervisor import Job

FIXTURE, MARK = "conformance_case", "conformance"
_OPENERS = pytest.StashKey[dict[str, Callable[[int], Any]]]()


class ConformanceCase:
    """One case on one backend."""

    def __init__(self, case: Case, open: Callable[[int], Backend], properties: list[tuple[str, object]]) -> None:
        self.id = case.id
        self.checked = False
        self._case, self._open, self._properties = case, open, properties

    def check(self) -> None:
        """Runs the case. Fails unless it passes, or is rightly declined: property `conformance` says which."""
        from polyradix_conformance import mustpass
        from polyradix_conformance.runner import run_case
        from polyradix_conformance.supervisor import Claims

        self.checked = True
        caps = Claims.of(self._open(1)).caps
        result = run_case(self._case, self._open)
        self._properties.append((MARK, result.status))
        wrong = mustpass.objection(result.status, mustpass.needs(self._case), caps)
        if wrong:
            pytest.fail(f"{wrong}: {result.detail}", pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARK}(backend, profile='dense', emulate=False, options=None): one test per case, on a backend"
    )
    config.stash[_OPENERS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker(MARK)
    wants = FIXTURE in metafunc.fixturenames
    if not wants and mark is None:
        return
    try:
        if not wants or mark is None:
            raise ValueError(f"mark {MARK!r} and fixture {FIXTURE!r} go together")
        job, cases = _asked(*mark.args, **mark.kwargs)
    except (TypeError, ValueError) as e:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {e}") from e
    metafunc.parametrize(FIXTURE, [(job, c) for c in cases], ids=[c.id for c in cases], indirect=True)


def _asked(
    *, backend: str, profile: str = "dense", emulate: bool = False, options: dict[str, Any] | None = None
) -> tuple[Job, list[Case]]:
    from polyradix.backend.registry import GROUP
    from polyradix_conformance.cases import all_cases
    from polyradix_conformance.supervisor import Job

    backends = sorted(entry_points(group=GROUP).names)
    profiles = sorted({c.profile for c in all_cases()})
    for name, value, known in (("backend", backend, backends), ("profile", profile, profiles)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of: {', '.join(known)}")
    return Job(backend, emulate, options or {}), [c for c in all_cases() if c.profile == profile]


@pytest.fixture
def conformance_case(request: pytest.FixtureRequest) -> Iterator[ConformanceCase]:
    """A case to `check()`, which a test must not forget."""
    job, case = request.param
    openers = request.config.stash[_OPENERS]
    made = ConformanceCase(case, openers.setdefault(repr(job), cache(job.open)), request.node.user_properties)
    yield made
    if not made.checked:
        pytest.fail(f"{case.id}: the test did not call {FIXTURE}.check()", pytrace=False)
