"""The vendor kit: what `new-backend` writes is clean, its order of work is true, and the example was made from it."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import Backend, Ops
from polyradix.serve.new_backend import new_backend, render
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run

SLOW = ("L3/", "L4/")  # ci/example.sh runs every case
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "eager-backend"


def test_what_is_written_is_clean(tmp_path):
    new_backend("my_chip", tmp_path / "new")
    for args in (["check", "--extend-select", "E,F,W,I,UP,B,RUF"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *args, "--no-cache", "."]
        done = subprocess.run(command, cwd=tmp_path / "new", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["tests/test_conformance.py", ".github/workflows/conformance.yml"])
def test_the_example_is_what_was_written(name):
    assert (EXAMPLE / name).read_text() == render("eager")[name]


def test_the_example_is_short():
    done = subprocess.run(["git", "ls-files", "."], cwd=EXAMPLE, capture_output=True, text=True, check=True)
    lines = sum(len((EXAMPLE / name).read_text().splitlines()) for name in done.stdout.splitlines())
    assert 100 < lines < 500


def test_the_guide_has_the_same_order_of_work():
    rows = [line for line in render("mychip")["README.md"].splitlines() if line.startswith("|")]
    guide = (EXAMPLE.parents[1] / "docs" / "add-a-backend.md").read_text().splitlines()
    assert len(rows) > 5
    assert [row for row in rows if row not in guide] == []


def stages():
    """(methods to write, filters of the cases that pass then), from the table of the README that is written."""
    for line in render("eager")["README.md"].splitlines():
        if line.startswith("| `"):
            write, cases = line.strip("| ").split(" | ")
            yield re.findall(r"`(\w+)`", write), re.findall(r"`([^`]+)`", cases)


def verbs(contract):
    return {n for n in vars(contract) if callable(vars(contract)[n]) and n[0] != "_" and not hasattr(Expansions, n)}


def without(obj, contract, written):
    """Takes the methods away that are not `written` yet."""
    for name in verbs(contract) - written:

        @functools.wraps(getattr(obj, name))
        def unwritten(*args, name=name, **kwargs):
            raise Unsupported(name)

        setattr(obj, name, unwritten)


def test_the_order_of_work_is_true(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from polyradix_eager import entry

    cases = [c for c in all_cases() if c.profile == "dense" and c.needs.dtype == "float32"]
    written = set()
    for methods, filters in stages():
        written.update(methods)
        backend = entry.create()
        without(backend, Backend, written)
        without(backend.ops, Ops, written)
        for text in [f for f in filters if f not in SLOW]:
            results = run([c for c in cases if text in c.id][::12], lambda tp, backend=backend: backend)
            assert any(r.status == "pass" for r in results)
            assert [r for r in results if not r.good] == []
    assert written >= verbs(Backend) | verbs(Ops)
