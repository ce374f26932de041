"""The AITER that is installed, looked at without importing it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyradix_rocm.aiter.calls import CALLS, misfit
from polyradix_rocm.aiter.signatures import Signatures, read_all, recorded
from polyradix_rocm.device import VERSIONS

PACKAGE, FOREIGN = "amd-aiter", "aiter"  # the second is an asyncio helper on PyPI
REMEDY = (
    f"install {PACKAGE} from github.com/ROCm/aiter, v{VERSIONS[0]} or v{VERSIONS[1]} (never `pip install {FOREIGN}`)"
)


class NoAiter(RuntimeError):
    """AITER cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class Installed:
    """A Provider. `version` is the recorded one it counts as, `release` what it calls itself."""

    version: str
    arch: str
    signatures: Signatures
    release: str

    def function(self, path: str) -> Callable[..., Any]:
        module, _, name = path.rpartition(".")
        out: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return out


def installed(arch: str) -> Installed:
    """Raises NoAiter for none, for another package of that name, alone or over it, and for one that has nothing that is
    called."""
    release, foreign, spec = _version(PACKAGE), _version(FOREIGN), find_spec(FOREIGN)  # which imports nothing
    if release and foreign:
        what = f"{FOREIGN} {foreign}, another project's package, is in the same folder as {PACKAGE} {release}"
        raise NoAiter(f"{what}: uninstall both, then {REMEDY}")
    if release is None or spec is None or spec.origin is None:
        what = f"{FOREIGN} {foreign} is another project's package" if foreign else f"{PACKAGE} is not installed"
        raise NoAiter(f"{what}: {REMEDY}")
    root = Path(spec.origin).parent.parent
    found = read_all(lambda path: (root / path).read_text())
    if not found:
        raise NoAiter(f"{PACKAGE} {release} in {root} has none of the functions that are called: {REMEDY}")
    return Installed(nearest(found), arch, found, release)


def nearest(found: Signatures) -> str:
    """The recorded version whose signatures differ in fewest, the newer of two."""
    return min(reversed(VERSIONS), key=lambda v: sum(found.get(n) != s for n, s in recorded(v).items()))


def summary(found: Installed) -> str:
    """One line for a log, with what cannot be called and whether the version is known."""
    unfit = [why for name in CALLS if (why := misfit(name, found.signatures))]
    known = found.signatures == recorded(found.version)
    text = f"{PACKAGE} {found.release}"
    text += f", as {found.version}" if known else f", unknown, called as {found.version}: run polyradix-rocm selftest"
    return text + (f"; not used: {'; '.join(unfit)}" if unfit else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
