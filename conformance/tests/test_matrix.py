"""The matrix: every number recounted from the reports, bad files refused, and text from a report never markup."""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polyradix_conformance.matrix.cli import add_parser
from polyradix_conformance.matrix.model import state_of
from polyradix_conformance.report import seal

Json = dict[str, Any]
HOSTILE = "</script><script>window.hacked = 1</script> | `x` <b>*bold*</b>"


def conform_matrix(*args: Path | str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["matrix", *map(str, args)])
    code: int = parsed.func(parsed)
    return code


def changed(report: Json, prefix: str, **fields: Any) -> Json:
    """Its cases whose id starts with `prefix`, changed."""
    out = copy.deepcopy(report)
    hits = [c for c in out["cases"] if c["id"].startswith(prefix)]
    assert hits
    for case in hits:
        case.update(fields)
    statuses = [c["status"] for c in out["cases"]]
    out["counts"] = {s: statuses.count(s) for s in statuses}
    return out


def timings(report: Json, *cases: tuple[str, float | None]) -> Json:
    """A perf file of the report's backend, from ids and shares; None for one whose outputs were wrong."""
    same = {k: report[k] for k in ("suite", "protocol", "backend", "options", "emulated", "device", "date")}
    return {
        "schema": "polyradix-conformance-perf-1",
        **same,
        "size": "serving",
        "partial": False,
        "ceilings": {"read_gb_s": 10.0, "gflop_s": {"float32": 50.0}, "how": "made up"},
        "cases": [
            {
                "id": id, "seconds": 1e-3, "bytes": 1, "flops": 1, "bound": "memory", "share": share, "detail": "",
                "status": "fail" if share is None else "pass",
            }
            for id, share in cases
        ],
    }  # fmt: skip


class Written:
    """matrix.md and matrix.html made from reports, and what was printed."""

    def __init__(self, folder: Path, *files: Json) -> None:
        for n, data in enumerate(files):
            (folder / f"{n}.json").write_text(json.dumps(seal(data)))
        assert conform_matrix(*(folder / f"{n}.json" for n in range(len(files))), "-o", folder / "out") == 0
        self.md = (folder / "out" / "matrix.md").read_text()
        self.html = (folder / "out" / "matrix.html").read_text()
        self.page = Page(self.html)

    def cells(self, row: str) -> list[str]:
        """Of one row of the Markdown table."""
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in self.md.splitlines() if line.startswith("|")]
        (cells,) = [r for r in rows if r[0].strip(" *").replace("\\", "") == row]
        return [c.strip() for c in cells[1:]]


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._in = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data: str) -> None:
        if self._in not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    return lambda *files: Written(tmp_path, *files)


def test_cells_are_counted_from_the_cases(write: Callable[..., Written], good: Json) -> None:
    report = changed(good, "L1/attend/decode/softcap/float32", status="fail", error_to_floor=7.5, detail="wrong")
    out = write(report)
    cases = report["cases"]

    def recount(cases: list[Json]) -> str:
        return f"{sum(c['status'] == 'pass' for c in cases)}/{len(cases)}"

    attend = [c for c in cases if c["id"].startswith("L1/attend/")]
    verbs = [c for c in cases if c["id"].startswith("L1/")]
    softcap = [c for c in cases if "softcap" in c["needs"]["features"]]
    assert out.cells("attend") == [f"✕ {recount(attend)} (7.50x)"]
    assert out.cells("softcap") == [f"✕ {recount(softcap)} (7.50x)"]
    assert out.cells("L1 verbs") == [f"✕ {recount(verbs)} (7.50x)"]
    for name, key, value in (("head size 256", "head_dim", 256), ("page size 8", "page_size", 8)):
        assert out.cells(name) == [f"✓ {recount([c for c in cases if c['needs'][key] == value])} (1.25x)"]
    assert "qk_norm" in {c["id"].split("/")[1] for c in cases}
    assert sum(line.startswith("| qk\\_norm |") for line in out.md.splitlines()) == 1  # a feature, and not again a verb
    assert "✓ all pass" in out.md
    assert f"✕failed, or does not count {len(attend) - 1}/{len(attend)} 7.50" in " ".join(out.page.text.split())


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        ("pass pass", "pass"),
        ("pass unsupported", "some"),
        ("unsupported unsupported", "declined"),
        ("pass waived unsupported", "waived"),
        ("pass waived not_run", "not_run"),
        ("pass not_run fail", "failed"),
        ("error unsupported", "failed"),
        ("", "not_run"),
    ],
)
def test_a_cell_is_as_bad_as_its_worst_case(statuses: str, state: str) -> None:
    assert state_of({"status": s, "problem": ""} for s in statuses.split()) == state


def test_verdicts_are_those_of_verify(write: Callable[..., Written], good: Json) -> None:
    waiver = {"reason": "known", "link": "https://example.org/1", "device": "b", "expires": "2999-01-01"}
    waived = changed({**good, "backend": "b"}, "L2/moved/float32", status="waived", waiver=waiver)
    expired = changed({**waived, "backend": "c"}, "L2/moved/float32", waiver={**waiver, "expires": "2020-01-01"})
    short = {**good, "backend": "d", "cases": good["cases"][1:], "counts": {"pass": len(good["cases"]) - 1}}
    out = write({**good, "backend": "a"}, waived, expired, short)
    a, b, c, d = [line for line in out.md.splitlines() if line.startswith("- ")]
    assert "**conformant** (" in a
    assert "**conformant, with waivers** (" in b
    assert f"**not conformant**: 1 of {len(good['cases'])} cases" in c
    assert "missing from the report" in d
    assert [cell[0] for cell in out.cells("moved")] == ["✓", "△", "✕", "✓"]
    assert "Verdicts: 2 of 4 conformant" in out.page.text


def test_only_the_newest_report_of_a_backend_counts(write: Callable[..., Written], good: Json) -> None:
    new = {**good, "date": "2026-05-02T00:00:00+00:00"}
    old = changed({**good, "date": "2026-05-01T23:00:00+00:00"}, "L1/attend", status="fail", detail="long ago")
    out = write(new, old)
    assert out.cells("attend")[0].startswith("✓")
    assert len(out.cells("attend")) == 1
    assert "1.json (numpy, 2026-05-01) is older than 0.json and not counted" in out.md
    assert "1.json (numpy, 2026-05-01) is older than 0.json and not counted" in out.page.text


def test_another_device_options_or_emulation_is_another_column(write: Callable[..., Written], good: Json) -> None:
    others = [{"device": "other"}, {"options": {"async_launch": 1}}, {"emulated": True}]
    out = write(good, *({**good, **o} for o in others))
    assert len(out.cells("attend")) == 4
    assert out.md.count("**emulated**") == 2  # in its verdict, and in its column
    ids = [attrs["id"] for _, attrs in out.page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("count", [1, 12])
def test_one_backend_and_twelve(write: Callable[..., Written], good: Json, count: int) -> None:
    out = write(*({**good, "backend": f"b{n:02}"} for n in range(count)))
    assert len(out.cells("attend")) == count
    columns = [a for a in out.page.of("th") if a.get("scope") == "col"]
    assert len(columns) == 2 * count + 1
    assert f"Verdicts: {count} of {count} conformant" in out.page.text


def test_profiles_of_one_backend_share_a_column(write: Callable[..., Written], good: Json) -> None:
    mesh = {**good, "profile": "made-up", "cases": copy.deepcopy(good["cases"][:1]), "counts": {"pass": 1}}
    mesh["cases"][0].update(id="L5/some_verb/float32")
    mesh["cases"][0]["needs"].update(tp=2)
    out = write(good, mesh, {**good, "backend": "without"})
    assert out.cells("some_verb") == ["✓ 1/1 (1.25x)", "—"]
    assert out.cells("tensor parallel 2") == ["✓ 1/1 (1.25x)", "—"]


def test_the_share_of_the_roofline_is_of_the_same_backend_and_device(write: Callable[..., Written], good: Json) -> None:
    perf = timings(good, ("P/attend/decode/float32", 0.414), ("P/attend/prefill/float32", 0.8), ("P/step/x", 0.5))
    half = {
        **timings(good, ("P/attend/decode/bfloat16", None)),
        "ceilings": {**perf["ceilings"], "gflop_s": {"x": 1.0}},
    }
    stray = {**perf, "device": "another"}
    out = write(good, {**good, "backend": "untimed"}, perf, half, stray)
    timed, untimed = out.cells("attend")
    assert timed.endswith("(1.25x; 41-80 %, timing failed)")
    assert untimed.endswith("(1.25x)")
    assert out.cells("step") == ["✓ 1/1 (50 %)", "—"]
    assert "numpy on another: timed on" in out.md


def test_text_from_a_report_is_no_markup(write: Callable[..., Written], good: Json) -> None:
    report = changed({**good, "device": HOSTILE, "notes": [HOSTILE]}, "L1/add/", status="error", detail=HOSTILE)
    clean, out = Page(write(good).html), write(report)
    assert HOSTILE in out.page.text
    assert [t for t, _ in out.page.tags if t in ("script", "b")] == [t for t, _ in clean.tags if t in ("script", "b")]
    assert len(out.cells("add")) == 1
    assert "<script>" not in out.md
    assert "\\| \\`x\\` &lt;b&gt;\\*bold" in out.md


def test_the_page_needs_nothing_else(write: Callable[..., Written], good: Json) -> None:
    page = write(good, timings(good, ("P/attend/x", 0.5))).page
    assert [attrs["href"] for attrs in page.of("a") if not str(attrs["href"]).startswith("#")] == []
    assert not any({"src", "srcset", "onclick", "onload"} & set(attrs) for _, attrs in page.tags)
    assert page.of("link") == page.of("img") == page.of("iframe") == []
    assert any("default-src 'none'" in str(a.get("content")) for a in page.of("meta"))


def test_bad_files_are_refused(tmp_path: Path, good: Json, capsys: pytest.CaptureFixture[str]) -> None:
    perf = timings(good, ("P/attend/x", 0.5))
    edited, edited_perf = seal(good), seal(perf)
    bad = {
        "edited": ({**edited, "device": "better"}, "digest"),
        "edited-perf": ({**edited_perf, "device": "better"}, "digest"),
        "partial": (seal({**good, "partial": True}), "partial"),
        "small-perf": (seal({**perf, "partial": True}), "partial"),
        "no-cases": (seal({**perf, "cases": []}), "cases"),
        "other": ({"schema": "x"}, "schema is 'x'"),
        "month": (seal({**good, "date": "2026-13-01T00:00:00+00:00"}), "month"),
    }
    (tmp_path / "good.json").write_text(json.dumps(seal(good)))
    for name, (data, message) in bad.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        assert conform_matrix(tmp_path / "good.json", path, "-o", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error
        assert message in error
    (tmp_path / "perf.json").write_text(json.dumps(edited_perf))
    assert conform_matrix(tmp_path / "perf.json", "-o", tmp_path / "out") == 2
    assert "no report" in capsys.readouterr().err
    assert conform_matrix(tmp_path / "absent.json", "-o", tmp_path / "out") == 2
    assert "absent.json: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
