"""In which order waiting requests are admitted. A retracted request has run before and always goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from polyradix.schedule.request import Request

Policy = Literal["lpm", "fcfs"]
LPM_MAX_WAITING = 128  # above this, looking up every prefix costs more than a good order gains


def admission_order(waiting: list[Request], policy: Policy, cached: Callable[[Request], int]) -> list[Request]:
    """A new list: for fcfs as they came; for lpm by cached prefix, longest first, ties as they came."""
    if policy == "fcfs" or len(waiting) > LPM_MAX_WAITING:
        return list(waiting)
    return sorted(waiting, key=lambda r: (not r.admitted, 0 if r.admitted else -cached(r)))
