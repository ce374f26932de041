"""The package that `new-backend` writes, from its files to a backend that the registry opens."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import Backend, Ops
from polyradix.backend.registry import ProtocolDrift, check_drift, open_backend
from polyradix.serve.new_backend import NewBackendError, new_backend


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "package"
    new_backend("my_chip", path)
    return path


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after `pip install`: importable, with its entry point."""
    info = package / "polyradix_my_chip-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polyradix-my-chip\nVersion: 0.1.0\n")
    text = (package / "pyproject.toml").read_text().split('entry-points."polyradix.backends"]\n')[1].split("\n")[0]
    (info / "entry_points.txt").write_text(f"[polyradix.backends]\n{text.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(package))
    yield
    for module in [m for m in sys.modules if m.startswith("polyradix_my_chip")]:
        del sys.modules[module]


def verbs(contract: type) -> list[str]:
    return [n for n, v in vars(contract).items() if callable(v) and not n.startswith("_")]


def test_files(package: Path) -> None:
    names = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    code = {f"polyradix_my_chip/{n}.py" for n in ("__init__", "backend", "ops")}
    rest = {"pyproject.toml", "README.md", "tests/test_conformance.py", ".github/workflows/conformance.yml"}
    assert names == code | rest
    assert not [p for p in package.rglob("*") if p.is_file() and "@name@" in p.read_text()]


@pytest.mark.usefixtures("installed")
def test_it_opens_and_every_method_is_declined_by_its_name() -> None:
    backend: Any = open_backend("my_chip")
    check_drift("my_chip", backend)
    for contract, offered in ((Backend, backend), (Ops, backend.ops)):
        for name in verbs(contract):
            if hasattr(Expansions, name):
                continue
            method = getattr(offered, name)
            with pytest.raises(Unsupported) as error:
                method(*[None] * len(inspect.signature(method).parameters))
            assert error.value.feature == name


@pytest.mark.usefixtures("installed")
def test_signatures_and_shapes_are_the_contracts() -> None:
    backend: Any = open_backend("my_chip")
    assert inspect.signature(type(backend).prepare) == inspect.signature(Backend.prepare)
    assert inspect.signature(type(backend.ops).attend) == inspect.signature(Ops.attend)
    assert backend.ops.linear.__doc__ == "[T,I] -> [T,O/tp], bias included if the spec has one."
    assert backend.pack.__doc__ == "Into the backend's own layout, placed on the device."


@pytest.mark.usefixtures("installed")
def test_a_method_taken_out_is_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyradix_my_chip.ops import MyChipOps

    monkeypatch.delattr(MyChipOps, "rope")
    with pytest.raises(ProtocolDrift, match=r"Ops\.rope is missing"):
        open_backend("my_chip")


@pytest.mark.usefixtures("installed")
def test_auto_does_not_take_an_unfinished_backend() -> None:
    assert open_backend("auto").caps.name != "my_chip"


@pytest.mark.parametrize("name", ["", "My", "my-chip", "1chip", "my chip", "../x", "a__b", "_a", "é"])
def test_bad_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(NewBackendError, match="expected lower-case letters"):
        new_backend(name, tmp_path / "package")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["numpy", "auto"])
def test_taken_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(NewBackendError, match=f"name is '{name}', which is taken"):
        new_backend(name, tmp_path / "package")


@pytest.mark.usefixtures("installed")
def test_installed_name(tmp_path: Path) -> None:
    with pytest.raises(NewBackendError, match="name is 'my_chip', which is taken"):
        new_backend("my_chip", tmp_path / "other")


def test_existing_folder_is_left_alone(package: Path) -> None:
    before = (package / "README.md").read_bytes()
    (package / "README.md").write_bytes(before + b"mine")
    with pytest.raises(NewBackendError, match="exists; expected a new folder"):
        new_backend("other", package)
    assert (package / "README.md").read_bytes() == before + b"mine"


def test_command(tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyradix.serve.cli", "new-backend", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)

    done = run("my_chip")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / line).is_file() for line in done.stdout.splitlines())
    assert (tmp_path / "polyradix-my-chip" / "pyproject.toml").is_file()
    again = run("my_chip")
    assert again.returncode == 1
    assert "polyradix: error: path is 'polyradix-my-chip', which exists" in again.stderr
