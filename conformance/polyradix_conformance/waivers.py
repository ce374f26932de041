"""Waivers: failures that are known, each with a reason, a link, a device and a day on which it expires."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

FIELDS = ("id", "reason", "link", "device", "expires")


class WaiverError(ValueError):
    """The file cannot be used; the message says why."""


@dataclass(frozen=True)
class Waiver:
    """`device` is the backend's entry-point name, for every device of it, or a device as its capabilities name it.
    The day `expires` is the last on which it holds."""

    reason: str
    link: str
    device: str
    expires: date

    def json(self) -> dict[str, str]:
        return {**asdict(self), "expires": self.expires.isoformat()}

    def why_not(self, backend: str, device: str, today: date) -> str | None:
        """Why it does not hold for a device of a backend, None when it does."""
        if self.device not in (backend, device):
            return f"waiver is for device {self.device!r}; expected the backend {backend!r} or its device {device!r}"
        return f"waiver expired on {self.expires}" if self.expires < today else None


def load(path: Path, ids: Collection[str]) -> dict[str, Waiver]:
    """Waivers by case id, each one of `ids`: the profile's. Raises WaiverError."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise WaiverError(f"{path}: {e}") from e
    entries = data.pop("waiver", None)
    if data or not isinstance(entries, list):
        raise WaiverError(f"{path}: holds {', '.join(data) or 'no [[waiver]]'}; expected only tables [[waiver]]")
    out: dict[str, Waiver] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}: waiver {number}"
        id, waiver = _waiver(where, entry)
        if id in out:
            raise WaiverError(f"{where}: id {id!r} has a waiver already")
        if id not in ids:
            raise WaiverError(f"{where}: id {id!r} is no case of this profile")
        out[id] = waiver
    return out


def _waiver(where: str, entry: Any) -> tuple[str, Waiver]:
    if not isinstance(entry, dict) or set(entry) != set(FIELDS):
        found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise WaiverError(f"{where}: has {found or 'nothing'}; expected {', '.join(FIELDS)}")
    for name in FIELDS[:-1]:
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise WaiverError(f"{where}: {name} is {entry[name]!r}; expected a text")
    if type(entry["expires"]) is not date:
        raise WaiverError(f"{where}: expires is {entry['expires']!r}; expected a date, such as 2030-12-31")
    return entry["id"], Waiver(*(entry[name] for name in FIELDS[1:]))
