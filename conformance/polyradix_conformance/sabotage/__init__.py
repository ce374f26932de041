"""Backends with one defect each, made from the NumPy one. A suite that passes any of them is not worth running.

`python -m polyradix_conformance.sabotage` prints which case kills which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.mesh import NumpyCollectives, NumpyMesh
from polyradix.backend.numpy.ops import NumpyOps
from polyradix.backend.protocol import Backend
from polyradix_conformance.cases import Case
from polyradix_conformance.runner import Result, run_case

Kind = TypeVar("Kind", bound=type[Any])


@dataclass(frozen=True)
class Sabotage:
    """`open` makes the backend over so many ranks. `hints` start the ids of the cases to try first: they save time and
    decide nothing. With `process` the defect takes its process along, so that only a supervisor survives it."""

    name: str
    text: str
    open: Callable[[int], Backend]
    hints: tuple[str, ...]
    process: bool = False


_FOUND: dict[str, Sabotage] = {}


def sabotage(*hints: str, process: bool = False, mesh: bool = False) -> Callable[[Kind], Kind]:
    """Registers a subclass of NumpyBackend, NumpyOps or NumpyCollectives; its docstring says what is wrong. Those with
    `mesh` can be split over ranks, the others claim one."""

    def register(kind: Kind) -> Kind:
        if kind.__name__ in _FOUND:
            raise ValueError(f"sabotage {kind.__name__!r} is defined twice")
        open = partial(_mesh if mesh else _single, kind)
        _FOUND[kind.__name__] = Sabotage(kind.__name__, str(kind.__doc__).partition("\n")[0], open, hints, process)
        return kind

    return register


def all_sabotages() -> list[Sabotage]:
    """Every one, module by module."""
    for module in iter_modules(__path__):
        if module.name != "__main__":
            import_module(f"{__name__}.{module.name}")
    return list(_FOUND.values())


def killer(this: Sabotage, cases: Iterable[Case]) -> Result | None:
    """The first case that tells `this` from a right backend, each on a fresh one; bfloat16 first, as its tolerance is
    the wider one."""
    order = sorted(cases, key=lambda c: (not c.id.startswith(this.hints), c.needs.dtype))
    return next((r for c in order if not (r := run_case(c, cache(this.open))).good), None)


def _single(kind: type[Any], tp: int) -> Backend:
    if tp > 1:
        raise Unsupported(f"tp {tp}")
    whole = issubclass(kind, NumpyBackend)
    backend: NumpyBackend = (kind if whole else NumpyBackend)("float32", False)
    if not whole:
        backend.ops = kind(backend._wide, backend._store)
    backend.caps = replace(backend.caps, max_tp=1)
    return backend


def _mesh(kind: type[Any], tp: int) -> Backend:
    """Right on one rank."""
    if tp == 1:
        return NumpyBackend("float32", False)
    if issubclass(kind, NumpyMesh):
        return kind("float32", False, tp)
    mesh = NumpyMesh("float32", False, tp)
    if issubclass(kind, NumpyCollectives):
        mesh.collectives, kind = kind(mesh.ranks), NumpyOps
    mesh.ops = kind(mesh._wide, mesh._store, mesh.collectives)
    return mesh
