"""What a package needs beside its Python files is in its wheel, too; an editable install would not show it missing."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = sorted(p.parent for p in [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("backends/*/pyproject.toml")])
BUILT = {".so", ".sha256", ".pyc"}


def left_out(project: Path) -> list[Path]:
    """Data files of a distribution that no pattern of its package-data names."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages, held = [p.parent for p in project.glob("polyradix*/__init__.py")], set[Path]()
    for name, patterns in settings.get("package-data", {}).items():
        for package in packages:
            folders = [package] if name == package.name else package.glob("**/") if name == "*" else []
            held.update(f for folder in folders for pattern in patterns for f in folder.glob(pattern))
    data = (f for p in packages for f in p.rglob("*") if f.is_file() and f.suffix not in {".py", *BUILT})
    return sorted(set(data) - held)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda p: p.name)
def test_data_files_are_in_the_wheel(project: Path) -> None:
    assert list(project.glob("polyradix*/__init__.py"))
    assert left_out(project) == []


def test_one_left_out_is_seen(tmp_path: Path) -> None:
    deep = tmp_path / "polyradix_some" / "deep" / "deeper"
    deep.mkdir(parents=True)
    (tmp_path / "polyradix_some" / "__init__.py").touch()
    (deep / "table.json").touch()
    (tmp_path / "pyproject.toml").write_text('[tool.setuptools.package-data]\npolyradix_some = ["*/*.json"]\n')
    assert left_out(tmp_path) == [deep / "table.json"]
