"""The list of cases. Every module of this folder registers its own with `case`; a new profile is a new module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from polyradix.backend.capabilities import Needs
from polyradix_conformance.rig import Rig

Body = Callable[[Rig], None]


@dataclass(frozen=True)
class Case:
    """One test. A backend whose capabilities do not cover `needs` and `page_size` must raise Unsupported instead."""

    id: str  # layer/subject/parameters, the same for every backend
    needs: Needs
    run: Body
    page_size: int | None = None
    profile: str = "dense"

    @property
    def layer(self) -> str:
        return self.id.split("/")[0]


_CASES: dict[str, Case] = {}


def case(
    id: str,
    dtype: str,
    body: Body,
    head_dim: int = 64,
    features: tuple[str, ...] = (),
    page_size: int | None = None,
    tp: int = 1,
    profile: str = "dense",
) -> None:
    """Registers a case; its full id ends with the dtype. With `tp` its rig's backend is split over that many ranks."""
    full = f"{id}/{dtype}"
    if full in _CASES:
        raise ValueError(f"case id {full!r} is used twice")
    _CASES[full] = Case(full, Needs(dtype, head_dim, frozenset(features), tp), body, page_size, profile)


def all_cases() -> list[Case]:
    """Every case, layer by layer."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return sorted(_CASES.values(), key=lambda c: c.layer)
