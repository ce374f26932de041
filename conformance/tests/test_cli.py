"""The command: what it writes, and that bad input gets a clear message, a non-zero exit and no report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyradix_conformance import mustpass, supervisor
from polyradix_conformance.cases import all_cases
from polyradix_conformance.cli import main
from polyradix_conformance.report import load

Install = Callable[[str], None]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def run(out: Path, backend: str = "vendor", only: str = "L0/", *more: str) -> int:
    return main(["run", "--backend", backend, "--only", only, "-o", str(out), *more])


def test_run_writes_a_report_that_says_it_is_partial(out: Path, capsys: Capture) -> None:
    assert run(out, "numpy", "L1/add/", "--option", "compute=float32") == 0
    report = load(out)
    assert report["counts"] == {"pass": 8}
    assert report["options"] == {"compute": "float32"}
    assert all(0 < c["error_to_floor"] <= 3 for c in report["cases"])
    assert report["machine"]["packages"].keys() >= {"polyradix", "polyradix-conformance", "numpy"}
    assert "dense [partial]: passed, but only some cases were run (8 pass)" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 1
    assert capsys.readouterr().out == f"{out}: partial: only some cases were selected\n"
    assert [p.name for p in out.parent.iterdir()] == ["report.json"]


def test_an_out_of_tree_backend_is_run_and_its_packages_are_named(vendor: Install, out: Path) -> None:
    vendor("")
    assert run(out) == 0
    packages = load(out)["machine"]["packages"]
    assert packages["vendor-chip"] == "1.2"
    assert "pluggy" in packages


def test_null_fails_run_and_verify(out: Path, capsys: Capture) -> None:
    assert main(["run", "--backend", "null", "-o", str(out)]) == 1
    assert "NOT conformant" in capsys.readouterr().out
    passed = {c["id"].rpartition("/")[0] for c in load(out)["cases"] if c["status"] == "pass"}
    claims_and_zeros = {"L0/methods", "L0/capabilities", "L0/memory", "L0/page_bytes", "L2/zeroed"}
    assert passed <= claims_and_zeros | {"L1/meta/shift", "L1/meta/sampled_in_any_order"}  # null samples by seed alone
    assert main(["verify", str(out)]) == 1


def test_a_backend_that_declines_everything_fails_run_and_verify(vendor: Install, out: Path, capsys: Capture) -> None:
    vendor("""
    def create(self):
        made = Vendor()
        made.caps = Capabilities("vendor", "none", frozenset(), (16,), 0)
        return made
    def decline(self, *args):
        raise Unsupported("everything")
    def decline(self, spec, read):
        raise Unsupported("everything")
    Entry.create, Vendor.pack = create, decline
    """)
    assert run(out, only="L1/add") == 1
    assert load(out)["counts"] == {"unsupported": 16}
    shown = capsys.readouterr().out
    assert "L1/add/normal/float32: unsupported, but it must pass on every backend" in shown
    assert "NOT conformant: no case passed (16 unsupported)" in shown
    assert main(["verify", str(out)]) == 1
    assert "no case passed" in capsys.readouterr().out


def test_a_case_that_no_list_knows_does_not_count(
    monkeypatch: pytest.MonkeyPatch, out: Path, tmp_path: Path, capsys: Capture
) -> None:
    listed = dict(mustpass.load("dense"))
    del listed["L0/memory/float32"]
    monkeypatch.setattr(mustpass, "load", lambda profile: listed)
    assert run(out, "numpy", "L0/memory") == 1
    assert "L0/memory/float32: unknown to dense-v1" in capsys.readouterr().out


def test_a_case_that_hangs_is_an_error_in_a_report_that_does_not_verify(
    vendor: Install, out: Path, capsys: Capture
) -> None:
    vendor("Vendor.memory = lambda self: time.sleep(600)")
    assert run(out, "vendor", "/float32", "--only", "L0/memory", "--timeout", "2.5") == 1
    assert "error       L0/memory/float32 " in capsys.readouterr().out
    report = load(out)
    assert [c["detail"] for c in report["cases"]] == ["timed out after 2.5 s"] * 2
    assert report["counts"] == {"error": 2}
    assert main(["verify", str(out)]) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('no driver')", "conform: device 'vendor' cannot be used: ImportError: no driver"),
        ("Entry.create = lambda self: 1 / 0", "conform: ZeroDivisionError: division by zero"),
        ("Entry.create = lambda self: time.sleep(600)", "conform: while it was being opened, timed out after 4 s"),
    ],
)
def test_a_backend_that_cannot_be_opened_leaves_no_report(
    vendor: Install, monkeypatch: pytest.MonkeyPatch, out: Path, capsys: Capture, source: str, message: str
) -> None:
    if "sleep" in source:
        monkeypatch.setattr(supervisor, "OPEN_S", 4.0)
    vendor(source)
    out.write_text("the report of a better day")
    assert run(out, "vendor", "L0/", "--timeout", "1") == 2
    assert capsys.readouterr().err.startswith(message)
    assert list(out.parent.glob("*report*")) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--backend", "nope"], "conform: device is 'nope'; expected auto or one of:"),
        (
            ["run", "--backend", "numpy", "--option", "speed=9"],
            "device 'numpy' has no option 'speed'; it has: compute, async_launch",
        ),
        (["run", "--backend", "numpy", "--profile", "none"], "profile is 'none'; expected one of: dense"),
        (["list", "--profile", "none"], "profile is 'none'; expected one of: dense"),
        (["mustpass", "--profile", "none"], "profile is 'none'; expected one of: dense"),
        (["run", "--backend", "numpy", "--only", "L9"], "no case of profile 'dense' has 'L9' in its id"),
        (["list", "--only", "L9"], "no case of profile 'dense' has 'L9' in its id"),
        (["run", "--backend", "numpy", "-o", "no/such/folder/r.json"], "cannot write no/such/folder/r.json: No such"),
        (["run", "--backend", "numpy", "--waivers", "none.toml"], "none.toml: [Errno 2]"),
    ],
)
def test_what_cannot_be_done_is_said(capsys: Capture, args: list[str], message: str) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_positive_number(capsys: Capture, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--backend", "numpy", "--timeout", value])
    assert f"{value!r} is not a positive number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "all"])
def test_jobs_is_a_count(capsys: Capture, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--backend", "numpy", "--jobs", value])
    assert f"{value!r} is not an integer of at least 1" in capsys.readouterr().err


def test_list_prints_the_ids_of_a_profile(capsys: Capture) -> None:
    for profile in {c.profile for c in all_cases()}:
        assert main(["list", "--profile", profile]) == 0
        assert capsys.readouterr().out.split() == [c.id for c in all_cases() if c.profile == profile]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from polyradix_conformance.cli import main; sys.exit(main(['list']))"
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run([sys.executable, "-c", code], stdout=ours, stderr=subprocess.PIPE)
    os.close(ours)
    assert (done.returncode, done.stderr) == (2, b"")


def test_mustpass_prints_needs(capsys: Capture) -> None:
    assert main(["mustpass", "--profile", "dense"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "L1/attend/page-8/float32 if page_size=8" in lines
    assert "L1/attend/dim-96/float32 if head_dim=96" in lines
    assert "L1/attend/dim-128/bfloat16" in lines
    assert "L1/attend/decode/window-7/float32 if window" in lines


WAIVER = """
[[waiver]]
id = "L0/memory/float32"
reason = "the driver does not say"
link = "https://example.com/1"
device = "vendor"
expires = 2999-01-01
"""


@pytest.fixture
def waiver(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "waivers.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("old", "new", "code", "status", "message"),
    [
        ("", "", 0, "waived", "1 waived"),
        ('"vendor"', '"other chip"', 1, "fail", "waiver is for device 'other chip'; expected the backend 'vendor'"),
        ("2999", "2019", 1, "fail", "waiver expired on 2019-01-01"),
        ("L0/memory", "L0/methods", 1, "pass", "L0/methods/float32: pass, so its waiver has to go"),
    ],
    ids=["holds", "device", "expired", "passes"],
)
def test_a_waiver_that_does_not_hold_spoils_the_run(
    vendor: Install, waiver: Callable[[str], str], out: Path, capsys: Capture,
    old: str, new: str, code: int, status: str, message: str,
) -> None:  # fmt: skip
    vendor("Vendor.memory = lambda self: None")
    file = waiver(WAIVER.replace(old, new))
    assert run(out, "vendor", "/float32", "--only", "L0/me", "--waivers", file) == 1  # memory/bfloat16 has none
    shown = capsys.readouterr().out
    case = next(c for c in load(out)["cases"] if c["waiver"])
    assert case["status"] == status
    assert message in shown
    assert code == 0 or f"{case['id']}: " in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WAIVER.replace("L0/memory/float32", "L0/nothing"), "waiver 1: id 'L0/nothing' is no case of this profile"),
        (WAIVER + WAIVER, "waiver 2: id 'L0/memory/float32' has a waiver already"),
        (WAIVER.replace("link", "url"), "waiver 1: has id, reason, url, device, expires; expected id, reason, link"),
        (WAIVER.replace('"the driver does not say"', '" "'), "waiver 1: reason is ' '; expected a text"),
        (WAIVER.replace("2999-01-01", '"2999-01-01"'), "waiver 1: expires is '2999-01-01'; expected a date"),
        (WAIVER.replace("2999-01-01", "2999-01-01T00:00:00Z"), "expected a date, such as 2030-12-31"),
        ("waivers = []", "holds waivers; expected only tables [[waiver]]"),
        ("", "holds no [[waiver]]; expected only tables [[waiver]]"),
        ("[[waiver", "Expected ']]'"),
    ],
)
def test_a_bad_file_of_waivers_stops_the_run(
    waiver: Callable[[str], str], out: Path, capsys: Capture, text: str, message: str
) -> None:
    assert run(out, "numpy", "L0/", "--waivers", waiver(text)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_command_and_its_neighbours_are_there() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "polyradix_conformance.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f" {name} " in shown for name in ("run", "list", "verify", "mustpass", "matrix", "perf"))


def test_the_schema_is_a_schema_and_reports_are_plain_json(good: dict[str, object]) -> None:
    import jsonschema

    import polyradix_conformance

    schema = json.loads((Path(polyradix_conformance.__path__[0]) / "schema" / "report-1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(good, schema)
