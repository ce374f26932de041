"""Which cases of a profile must pass. `<profile>-v1.txt` has one full case id a line, and behind it what the case needs
beyond what every backend offers: `L1/attend/page-8/float32 if page_size=8`. It must pass, and may be declined only by
a backend whose capabilities lack one of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyradix_conformance.cases import Case

FOLDER = Path(__file__).parent
EVERYWHERE = (0, 64, 128)  # head sizes that no backend may decline; 0 of a model without `attend`

MustPass = Mapping[str, tuple[str, ...]]  # case id -> what it needs


def name(profile: str) -> str:
    return f"{profile}-v1"


def path(profile: str) -> Path:
    return FOLDER / f"{name(profile)}.txt"


def profiles() -> list[str]:
    """Those that have a list."""
    return sorted(p.name.removesuffix("-v1.txt") for p in FOLDER.glob("*-v1.txt"))


@cache
def load(profile: str) -> MustPass:
    """The list of a profile, empty for one without. Raises ValueError for a line that is malformed or used twice."""
    return parse(path(profile).read_text()) if profile in profiles() else {}


def parse(text: str) -> MustPass:
    out: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        id, word, needs = line.partition(" if ")
        conditions = tuple(needs.split(" and ")) if word else ()
        if " " in id or not all(conditions) or not id:
            raise ValueError(f"must-pass line {line!r}; expected ID or ID if NEED and NEED")
        if id in out:
            raise ValueError(f"must-pass id {id!r} is listed twice")
        out[id] = conditions
    return out


def needs(case: Case) -> tuple[str, ...]:
    """What a case needs beyond what every backend offers."""
    out = sorted(case.needs.features)
    if case.needs.head_dim not in EVERYWHERE:
        out.append(f"head_dim={case.needs.head_dim}")
    if case.needs.tp > 1:
        out.append(f"tp={case.needs.tp}")
    if case.page_size is not None:
        out.append(f"page_size={case.page_size}")
    return tuple(out)


def lines(cases: Iterable[Case]) -> str:
    """The list of these cases, as a file."""
    rows = {c.id: " and ".join(needs(c)) for c in cases}
    return "".join(f"{id} if {what}\n" if what else f"{id}\n" for id, what in sorted(rows.items()))


def lacking(conditions: Iterable[str], caps: Mapping[str, Any]) -> list[str]:
    """Those that capabilities, as in a report, do not claim."""
    return [c for c in conditions if not _claimed(c, caps)]


def _claimed(condition: str, caps: Mapping[str, Any]) -> bool:
    what, _, value = condition.partition("=")
    match what:
        case "head_dim":
            return int(value) <= int(caps["max_head_dim"]) and int(value) % int(caps["head_dim_multiple"]) == 0
        case "tp":
            return int(value) <= int(caps["max_tp"])
        case "page_size":
            return int(value) in list(caps["page_sizes"])
    return condition in list(caps["features"])


def objection(status: str, conditions: tuple[str, ...], caps: Mapping[str, Any]) -> str | None:
    """Why a case of this status does not count as conformant, None when it does."""
    lacks = lacking(conditions, caps)
    match status:
        case "pass" if lacks:
            return f"pass, but the capabilities do not claim {', '.join(lacks)}"
        case "pass" | "waived":
            return None
        case "unsupported" if lacks:
            return None
        case "unsupported" if conditions:
            return f"unsupported, but the capabilities claim {', '.join(conditions)}"
        case "unsupported":
            return "unsupported, but it must pass on every backend"
    return status
