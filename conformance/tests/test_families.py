"""The page of model families: what the reports say, and nothing else."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from polyradix_conformance import golden
from polyradix_conformance.cases import all_cases
from polyradix_conformance.matrix.cli import add_parser
from polyradix_conformance.matrix.families import MODELS, family
from polyradix_conformance.report import seal

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "ci" / "reports").glob("*.json"))


def conform_families(*args: Path | str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["families", *map(str, args)])
    code: int = parsed.func(parsed)
    return code


def row(page: str, name: str) -> list[str]:
    (line,) = (x for x in page.splitlines() if x.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_page_is_what_the_kept_reports_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert conform_families(*REPORTS) == 0
    said = capsys.readouterr().out
    assert (ROOT / "docs" / "models.md").read_text() == said, "conform families ci/reports/*.json -o docs/models.md"


def test_every_row_says_what_it_stands_for() -> None:
    names = re.findall(r"^\| ([\w.-]+) \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    assert set(names) - {"family"} <= MODELS.keys()


def test_every_golden_model_has_cases() -> None:
    assert {family(c.id) for c in all_cases()} - {None} == set(golden.families())


def test_cases_are_counted(good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def page() -> str:
        statuses = [c["status"] for c in good["cases"]]
        good["counts"] = {s: statuses.count(s) for s in statuses}
        (tmp_path / "r.json").write_text(json.dumps(seal(good)))
        assert conform_families(tmp_path / "r.json") == 0
        return capsys.readouterr().out

    own = [c for c in good["cases"] if c["id"].startswith("L3/llama/")]
    assert row(page(), "llama")[-1] == f"✓ {len(own)}/{len(own)}"
    assert row(page(), "mistral")[2:4] == ["attend, linear\\_gated, qkv, rope", "window"]
    for status, symbol in (("fail", "✕"), ("not_run", "—"), ("error", "✕")):
        own[0].update(status=status, detail="x", error_to_floor=None)
        assert row(page(), "llama")[-1] == f"{symbol} {len(own) - 1}/{len(own)}"
        assert row(page(), "mistral")[-1].startswith("✓")


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text("{}")
    assert conform_families(tmp_path / "r.json", "-o", tmp_path / "x.md") == 2
    assert "conform families: " in capsys.readouterr().err
    assert not (tmp_path / "x.md").exists()
