"""What several test files use: out-of-tree backends, and a good report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from polyradix.backend import numpy
from polyradix_conformance import mustpass
from polyradix_conformance.cases import all_cases
from polyradix_conformance.report import build
from polyradix_conformance.runner import Result
from polyradix_conformance.supervisor import Claims, Job

IMPORTS = """
import os, signal, sys, time
from polyradix.backend import numpy
from polyradix.backend.capabilities import Capabilities, Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import Found

class Vendor(NumpyBackend):
    def __init__(self):
        super().__init__("float32", False)

class Entry:
    protocol = (1, 0)
    def probe(self):
        return Found(True, "of a test", rank=-1)
    def create(self):
        return Vendor()

entry = Entry()
"""


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs backend `vendor`: the NumPy one, changed by the source given."""

    def install(source: str) -> None:
        site = tmp_path / "site"
        info = site / "vendor_chip-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: vendor-chip\nVersion: 1.2\nRequires-Dist: pytest>=8\n"
        )
        (info / "entry_points.txt").write_text("[polyradix.backends]\nvendor = vendor_chip:entry\n")
        (site / "vendor_chip.py").write_text(IMPORTS + dedent(source))
        monkeypatch.syspath_prepend(site)

    return install


@cache
def _good() -> dict[str, Any]:
    cases = [c for c in all_cases() if c.id in mustpass.load("dense")]
    results = [Result(c.id, "pass", 0.5, error_to_floor=1.25) for c in cases]
    return build(Job("numpy"), Claims.of(numpy.entry.create()), "dense", False, cases, results, {}, 9.0)


@pytest.fixture
def good() -> dict[str, Any]:
    """A report of profile dense in which every case passes; made up."""
    return copy.deepcopy(_good())
