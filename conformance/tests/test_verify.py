"""What keeps a report from counting: nothing passes that was not run, is not whole, or was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from polyradix_conformance import mustpass
from polyradix_conformance.cases import all_cases
from polyradix_conformance.cli import main
from polyradix_conformance.report import ReportError, load, seal
from polyradix_conformance.verify import problems

Report = dict[str, Any]
DAY = date(2030, 6, 1)
WINDOW = "L1/attend/decode/window-7/float32"
PAGE = "L1/attend/page-8/float32"
DIM = "L1/attend/dim-128/bfloat16"


def case_of(report: Report, id: str) -> Report:
    found: Report = next(c for c in report["cases"] if c["id"] == id)
    return found


def counted(report: Report) -> Report:
    """With counts that agree with the cases, and a digest that agrees with both."""
    statuses = [c["status"] for c in report["cases"]]
    return seal({**report, "counts": {s: statuses.count(s) for s in sorted(set(statuses))}})


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "report.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def test_a_good_report_counts(good: Report, file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(good)
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: numpy on {good['device']}, dense: conformant\n"
    assert load(path) == good


def test_removing_any_case_is_noticed(good: Report) -> None:
    cases = good["cases"]
    assert len(cases) == len(mustpass.load("dense")) > 200
    assert problems(good, DAY) == []
    for i, case in enumerate(cases):
        report = counted({**good, "cases": cases[:i] + cases[i + 1 :]})
        assert problems(report, DAY) == [f"{case['id']}: missing from the report"]


@pytest.mark.parametrize("status", ["fail", "error", "not_run", "unsupported", "waived"])
def test_any_other_status_of_any_case_is_noticed(good: Report, status: str) -> None:
    for case in good["cases"]:
        case["status"] = status
        assert problems(counted(good), DAY)[0].startswith(f"{case['id']}: {status}")
        case["status"] = "pass"


@pytest.mark.parametrize(
    ("id", "caps"),
    [
        (WINDOW, {"features": ["mask"]}),
        (PAGE, {"page_sizes": [16]}),
        ("L1/attend/dim-96/float32", {"max_head_dim": 80}),
        ("L1/attend/dim-80/float32", {"head_dim_multiple": 32}),
    ],
)
def test_only_what_is_not_claimed_may_be_declined(good: Report, id: str, caps: Report) -> None:
    case = case_of(good, id)
    case["status"] = "unsupported"
    need = mustpass.load("dense")[id][0]
    assert problems(counted(good), DAY) == [f"{id}: unsupported, but the capabilities claim {need}"]
    good["caps"].update(caps)
    assert not [p for p in problems(counted(good), DAY) if p.startswith(id)]
    case["status"] = "pass"
    assert f"{id}: pass, but the capabilities do not claim {need}" in problems(counted(good), DAY)


def test_head_size_128_and_both_dtypes_may_not_be_declined(good: Report) -> None:
    good["caps"].update(max_head_dim=64, dtypes=["float32"])
    for case in good["cases"]:
        if case["id"] == DIM:
            case["status"] = "unsupported"
    assert f"{DIM}: unsupported, but it must pass on every backend" in problems(counted(good), DAY)


CHANGES: list[tuple[str, Callable[[Report], Any], str]] = [
    ("protocol", lambda r: r.update(protocol=[2, 0]), "protocol is 2.0; this suite verifies 1.0"),
    ("minor protocol", lambda r: r.update(protocol=[1, 1]), "protocol is 1.1; this suite verifies 1.0"),
    ("profile", lambda r: r.update(profile="warp"), "profile is 'warp'; expected one of: dense"),
    ("list", lambda r: r.update(mustpass="dense-v0"), "mustpass is 'dense-v0'; expected 'dense-v1'"),
    ("partial", lambda r: r.update(partial=True), "partial: only some cases were selected"),
    ("unknown", lambda r: r["cases"][0].update(id="L1/x"), "L1/x: unknown to dense-v1"),
    ("duplicate", lambda r: r["cases"].append(r["cases"][0]), ": 2 times in the report"),
    ("counts", lambda r: r.update(counts={"pass": 1}), "counts are {'pass': 1}; the cases say {'pass': "),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_report_that_says_so_itself_does_not_count(
    good: Report, file: Any, capsys: pytest.CaptureFixture[str], change: Callable[[Report], Any], message: str
) -> None:
    change(good)
    assert main(["verify", str(file(seal(good)))]) == 1
    assert message in capsys.readouterr().out


def test_a_report_without_a_pass_does_not_count(good: Report) -> None:
    for case in good["cases"]:
        case["status"] = "unsupported"
    good["caps"].update(features=[], page_sizes=[3], max_head_dim=0)
    found = problems(counted(good), DAY)
    assert found[0] == "no case passed"
    assert len(found) > 100


def test_twenty_problems_are_shown_and_the_rest_is_counted(
    good: Report, file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    total = len(good["cases"])
    path = file(counted({**good, "cases": good["cases"][:1]}))
    assert main(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1] == f"{path}: and {total - 1 - 20} more"


UNUSABLE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda b: b"", "is empty; expected JSON"),
    ("blank", lambda b: b" \n", "is empty; expected JSON"),
    ("binary", lambda b: b"\x89PNG\xff\x00", "is not text; expected JSON"),
    ("truncated", lambda b: b[:-1], "ends too early"),
    ("no JSON", lambda b: b"conformant", "is not JSON"),
    ("deep", lambda b: b"[" * 100_000, "is not JSON"),
    ("a list", lambda b: b"[]", "schema is 'list'; expected 'polyradix-conformance-report-1'"),
    ("another schema", lambda b: b.replace(b"report-1", b"report-7", 1), "schema is 'polyradix-conformance-report-7'"),
    ("edited", lambda b: b.replace(b'"dense"', b'"mesh"', 1), "the digest does not match"),
    ("digest", lambda b: b.replace(b'"digest": "', b'"digest": "0', 1), "digest: "),
    ("NaN", lambda b: b.replace(b"1.25", b"NaN", 1), "holds NaN, which is no number in JSON"),
    ("infinite", lambda b: b.replace(b"1.25", b"1e999", 1), "holds 1e999, which is no number in JSON"),
    ("repeated key", lambda b: b.replace(b"{", b'{"partial": true, ', 1), "key 'partial' is used twice in one object"),
    ("status", lambda b: b.replace(b'"pass"', b'"passed"', 1), "counts: 'passed' is not one of"),
    ("extra", lambda b: b.replace(b'"detail"', b'"verdict": "fine", "detail"', 1), "cases[0]: Additional properties"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in UNUSABLE], ids=[c[0] for c in UNUSABLE])
def test_what_is_no_report_is_named(
    good: Report, file: Any, capsys: pytest.CaptureFixture[str], change: Callable[[bytes], bytes], message: str
) -> None:
    path = file(change(json.dumps(good).encode()))
    assert main(["verify", str(path)]) == 2
    assert f"{path}: {message}" in capsys.readouterr().out


def test_every_truncation_is_noticed(good: Report, file: Any) -> None:
    text = json.dumps(good).encode()
    for cut in range(0, len(text), len(text) // 50):
        with pytest.raises(ReportError, match=r"is empty|ends too early|is not JSON"):
            load(file(text[:cut]))


def test_a_file_that_is_not_there_spoils_the_others(
    good: Report, file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(file(good)), str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read: No such file or directory" in capsys.readouterr().out


def test_a_sealed_report_holds_no_nan(good: Report) -> None:
    good["cases"][0]["error_to_floor"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal(good)


def waived(report: Report, status: str = "waived", **changes: str) -> Report:
    waiver = {"reason": "r", "link": "l", "device": "numpy", "expires": "2030-06-01", **changes}
    case_of(report, PAGE).update(status=status, detail="wrong", waiver=waiver)
    return counted(report)


def test_a_waiver_holds_until_its_day_for_the_backend_or_its_device(good: Report) -> None:
    assert problems(waived(good), DAY) == []
    assert problems(waived(good, device=good["device"]), DAY) == []
    assert problems(waived(good), date(2030, 6, 2)) == [f"{PAGE}: waiver expired on 2030-06-01"]


@pytest.mark.parametrize(
    ("status", "changes", "message"),
    [
        ("waived", {"device": "other"}, "waiver is for device 'other'; expected the backend 'numpy' or its device"),
        ("waived", {"expires": "2030-02-30"}, "waiver expires on '2030-02-30'"),
        ("pass", {}, "pass, so its waiver has to go"),
        ("unsupported", {}, "unsupported, so its waiver has to go"),
        ("fail", {}, "fail: wrong"),
        ("fail", {"expires": "2029-01-01"}, "waiver expired on 2029-01-01"),
        ("not_run", {}, "not_run: wrong"),
    ],
)
def test_a_waiver_that_does_not_hold_is_a_problem(
    good: Report, status: str, changes: dict[str, str], message: str
) -> None:
    (problem,) = problems(waived(good, status, **changes), DAY)
    assert problem.startswith(f"{PAGE}: {message}")


@pytest.mark.parametrize("profile", sorted({c.profile for c in all_cases()} | set(mustpass.profiles())))
def test_must_pass_lists_are_what_the_cases_say(profile: str) -> None:
    listed = mustpass.path(profile).read_text()
    assert listed == mustpass.lines(c for c in all_cases() if c.profile == profile), (
        "after a change of cases: conform mustpass --write"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na if window\n", "must-pass id 'a' is listed twice"),
        ("a if \n", "expected ID or ID if NEED and NEED"),
        ("a b\n", "expected ID"),
        ("\n", "expected ID"),
    ],
)
def test_a_bad_must_pass_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mustpass.parse(text)
