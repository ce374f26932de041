"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polyradix_conformance.cases import all_cases

pytest_plugins = ["pytester"]
all_cases()  # pytester drops what its runs import, and a module of cases cannot be imported twice

TEST = """
import pytest
@pytest.mark.conformance({mark})
def test_conformance(conformance_case): {body}
"""
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    def run(*args: str, mark: str = 'backend="numpy"', body: str = "conformance_case.check()") -> pytest.RunResult:
        pytester.makepyfile(TEST.format(mark=mark, body=body))
        pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *args)

    return run


def test_one_test_per_case(run: Run) -> None:
    result = run("-k", "L0", mark='backend="numpy", options={"compute": "float32"}')
    assert result.parseoutcomes()["passed"] == 12
    assert result.ret == 0


def test_a_failure_shows_its_detail_and_no_traceback(run: Run) -> None:
    result = run("-k", "L1/embed/float32", mark='backend="null"')
    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["fail: embed: shape is *; expected *"])
    result.stdout.no_fnmatch_line("*Mismatch*")


def test_what_is_rightly_declined_passes_and_says_so(
    run: Run, vendor: Callable[[str], None], pytester: pytest.Pytester
) -> None:
    vendor("""
    def create(self):
        made = Vendor()
        made.caps = Capabilities("vendor", "test", frozenset({"float32"}), (16,), 256)
        return made
    Entry.create = create
    """)
    result = run("-k", "page-8 or page-16 or embed", "--junitxml=out.xml", mark='backend="vendor"')
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) == (4, 2)  # bfloat16 may not be declined, pages of 8 may
    result.stdout.fnmatch_lines(["unsupported, but it must pass on every backend: *bfloat16*"])
    assert '<property name="conformance" value="unsupported"' in (pytester.path / "out.xml").read_text()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('backend="nope"', "*backend is 'nope'; expected one of: *numpy*"),
        ('backend="numpy", profile="warp"', "*profile is 'warp'; expected one of: dense*"),
        ('backend="numpy", speed=9', "*unexpected keyword argument 'speed'"),
        ('"numpy"', "*takes 0 positional arguments but 1 *"),
        ("", "*missing 1 required keyword-only argument: 'backend'"),
    ],
)
def test_a_bad_mark_is_an_error(run: Run, mark: str, message: str) -> None:
    result = run(mark=mark)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_a_mark_without_the_fixture_is_an_error(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_other=TEST.format(mark='backend="numpy"', body="pass").replace("conformance_case", ""))
    result = run("-k", "L0/methods")
    result.assert_outcomes(errors=1, deselected=result.parseoutcomes().get("deselected", 0))
    result.stdout.fnmatch_lines(["*mark 'conformance' and fixture 'conformance_case' go together"])


def test_a_test_that_checks_nothing_is_an_error(run: Run) -> None:
    result = run("-k", "L0/methods/float32", body="pass")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["L0/methods/float32: the test did not call conformance_case.check()"])


def test_a_backend_that_cannot_be_opened_fails_every_case(run: Run, vendor: Callable[[str], None]) -> None:
    vendor("raise ImportError('no driver')")
    result = run("-k", "L0/methods", mark='backend="vendor"')
    assert result.parseoutcomes()["failed"] == 2
    result.stdout.fnmatch_lines(["*cannot be used: ImportError: no driver"])


def test_no_case_selected_is_not_a_pass(run: Run) -> None:
    assert run("-k", "nothing_like_this").ret == pytest.ExitCode.NO_TESTS_COLLECTED
