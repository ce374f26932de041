"""Every call fits every supported AITER: recorded signatures, and the sources of the wheel that PyPI has.

POLYRADIX_AMD_AITER is that wheel, amd_aiter-0.1.7.post2.dev18; `make tests-rocm` downloads it. It is never installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from polyradix_rocm.aiter import installed, signatures
from polyradix_rocm.aiter.calls import CALLS, PATHS, misfit
from polyradix_rocm.aiter.signatures import parsed, read_all, recorded, text
from polyradix_rocm.device import VERSIONS

TOO_OLD = {"get_mla_metadata_v1", "mha_batch_prefill_func"}  # of 0.1.7


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("version", VERSIONS)
def test_call_fits(version: str, name: str) -> None:
    assert misfit(name, recorded(version)) is None


def test_what_an_old_version_lacks_is_named() -> None:
    why = {name: misfit(name, recorded("0.1.7")) for name in CALLS}
    assert {name for name in why if why[name]} == TOO_OLD
    lacks = "dtype_kv, dtype_q, kv_last_page_lens, page_size, work_info_set"
    assert why["get_mla_metadata_v1"] == f"aiter.ops.attention.get_mla_metadata_v1 does not take {lacks}"
    assert misfit("fused_moe", {}) == "aiter.fused_moe.fused_moe is missing"
    more = {PATHS["shuffle_weight"]: parsed("def f(x, layout, arch, deep=1): ...", "f")}
    assert misfit("shuffle_weight", more) == "aiter.ops.shuffle.shuffle_weight wants arch too"  # type: ignore[arg-type]


def test_of_the_real_wheel() -> None:
    with ZipFile(os.environ["POLYRADIX_AMD_AITER"]) as wheel:
        found = read_all(lambda path: wheel.read(path).decode())
    assert found == recorded("0.1.7")


def test_text_and_back() -> None:
    source = "class C: ...\ndef f(a, /, b: int, c=1, *, d=2): ...\n"
    signature = parsed(source, "f")
    assert signature is not None
    assert text(signature) == "a, b, c=None"
    assert parsed(source, "g") is None


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages of our own, where nothing else is called aiter."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    return tmp_path


def install(site: Path, package: str, version: str, signed: signatures.Signatures) -> None:
    """A package that can be found, and raises when it is imported."""
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    for name, signature in {"aiter.__init__.f": None, **signed}.items():
        module, _, function = name.rpartition(".")
        file = site / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(f"def {function}({text(signature) if signature else ''}): ...\nraise ImportError\n")


def test_none_and_a_foreign_one_are_refused(site: Path) -> None:
    with pytest.raises(installed.NoAiter, match=r"^amd-aiter is not installed: install amd-aiter from github"):
        installed.installed("gfx942")
    install(site, "aiter", "0.13", {})
    with pytest.raises(installed.NoAiter, match=r"^aiter 0\.13 is another project's package: install amd-aiter.*never"):
        installed.installed("gfx942")


def test_a_foreign_one_over_it_is_refused(site: Path) -> None:
    install(site, "amd-aiter", "0.1.20", recorded("0.1.20"))
    install(site, "aiter", "0.13", {})
    with pytest.raises(installed.NoAiter, match=r"^aiter 0\.13, another .* amd-aiter 0\.1\.20: uninstall both, then"):
        installed.installed("gfx942")


def test_an_empty_one_is_refused(site: Path) -> None:
    install(site, "amd-aiter", "9", {})
    with pytest.raises(installed.NoAiter, match=r"amd-aiter 9 in .* has none of the functions that are called"):
        installed.installed("gfx942")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_told_by_signatures(site: Path, version: str) -> None:
    install(site, "amd-aiter", "77", recorded(version))
    found = installed.installed("gfx950")
    assert (found.version, found.arch, found.release) == (version, "gfx950", "77")
    assert installed.summary(found) == f"amd-aiter 77, as {version}"


def test_an_unknown_version_is_said_to_be(site: Path) -> None:
    install(site, "amd-aiter", "0.1.7", recorded("0.1.7"))
    line = installed.summary(installed.installed("gfx942"))
    assert line.startswith("amd-aiter 0.1.7, unknown, called as 0.1.10: run polyradix-rocm selftest; not used: ")
    assert "get_mla_metadata_v1 does not take" in line
