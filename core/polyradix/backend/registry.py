"""Finds backends and opens one. Knows no device: a backend is an entry point of the group `polyradix.backends`."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from polyradix.backend.capabilities import Capabilities, Unsupported
from polyradix.backend.expand import Expanded, expansion_forced
from polyradix.backend.protocol import PROTOCOL_VERSION, Backend, Collectives, Found, Ops

GROUP = "polyradix.backends"


class Entry(Protocol):
    """What an entry point names. `protocol` is the contract's version that the backend was written for."""

    @property
    def protocol(self) -> tuple[int, int]: ...
    def probe(self) -> Found: ...  # cheap: no device is initialised, nothing is compiled
    def create(self, *args: Any, **options: Any) -> Backend: ...  # called with keywords only


class DeviceError(Exception):
    """No backend could be opened; the message says why."""


class UnknownDevice(DeviceError):
    """No backend of that name is installed."""


class UnknownOption(DeviceError):
    """The backend has no such option."""


class DeviceUnavailable(DeviceError):
    """The backend is installed and cannot be used here."""


class ProtocolDrift(DeviceError):
    """The backend was written for another contract."""


@dataclass(frozen=True)
class Discovered:
    """One installed backend: what its probe said, or `error` when it could not be imported or probed."""

    name: str
    found: Found | None
    error: str | None

    def why_not(self, emulate: bool = False) -> str | None:
        """Why it cannot be used here, None when it can."""
        if self.found is None:
            return self.error or "no probe result"
        if not self.found.available:
            return self.found.detail
        if self.found.emulated and not emulate:
            return f"{self.found.detail}; emulation has to be asked for with --emulate"
        return None


def discover() -> list[Discovered]:
    """Every installed backend by name. Imports each; a failure is a reason, never a crash."""
    return [_probe(point) for _, point in sorted(_points().items())]


def open_backend(device: str, *, tp: int = 1, emulate: bool = False, **options: Any) -> Backend:
    """The backend named `device`, or for `auto` the usable one with the highest rank that is not negative.

    By name, no other backend is imported. `options` go to the entry's `create`, over those its probe found. Raises
    UnknownDevice, UnknownOption, DeviceUnavailable, ProtocolDrift, or Unsupported when it cannot be split over `tp`.
    """
    points = _points()
    if device == "auto":
        device = _best(emulate)
    if device not in points:
        raise UnknownDevice(f"device is {device!r}; expected auto or one of:\n{_listing(discover(), emulate)}")
    this = _probe(points[device])
    reason = this.why_not(emulate)
    if reason is not None or this.found is None:
        raise DeviceUnavailable(f"device {device!r} cannot be used: {reason}")
    entry = cast(Entry, points[device].load())
    _check_version(device, entry)
    backend = entry.create(**{**this.found.options, **_known(device, entry, options), **_ranks(device, entry, tp)})
    check_drift(device, backend)
    if tp > backend.caps.max_tp:
        raise Unsupported(f"tp {tp}", f"device {device!r} offers at most {backend.caps.max_tp}")
    if (size := backend.collectives.size) != tp:
        raise ProtocolDrift(f"backend {device!r}: collectives.size is {size}; expected tp ({tp})")
    if backend.caps.emulated and not emulate:
        raise DeviceUnavailable(f"device {device!r} is emulated, which has to be asked for with --emulate")
    if this.found.emulated and not backend.caps.emulated:
        raise ProtocolDrift(f"backend {device!r}: its probe says emulated, its capabilities do not")
    if expansion_forced():
        backend.ops = cast(Ops, Expanded(backend.ops))
    return backend


def check_drift(name: str, backend: Any) -> None:
    """Raises ProtocolDrift naming each method that is missing, unknown, or takes other parameters than agreed."""
    if not isinstance(getattr(backend, "caps", None), Capabilities):
        raise ProtocolDrift(f"backend {name!r}: caps is not a Capabilities")
    missing = [part for part in ("ops", "collectives") if not hasattr(backend, part)]
    if missing:
        raise ProtocolDrift(f"backend {name!r}: {' and '.join(missing)} missing")
    drift = _drift("Backend", Backend, backend) + _drift("Ops", Ops, backend.ops)
    drift += _drift("Collectives", Collectives, backend.collectives)
    if drift:
        version = ".".join(map(str, PROTOCOL_VERSION))
        raise ProtocolDrift(f"backend {name!r} does not keep protocol {version}: " + "; ".join(drift))


def parse_option(text: str) -> tuple[str, str | int | float]:
    """KEY=VALUE of a command line, as open_backend's options have it. Raises argparse.ArgumentTypeError."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if value.isdecimal():
        return key, int(value)
    return key, float(value) if re.fullmatch(r"\d+\.\d+", value) else value


def _known(device: str, entry: Entry, options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(name for name in options if not _takes(entry, name))
    if unknown:
        names = ", ".join(p for p in inspect.signature(entry.create).parameters if p != "tp") or "none"
        raise UnknownOption(f"device {device!r} has no option {unknown[0]!r}; it has: {names}")
    return options


def _ranks(device: str, entry: Entry, tp: int) -> dict[str, int]:
    """What `create` is told of tp: nothing for one rank."""
    if tp < 1:
        raise ValueError(f"tp is {tp}; expected at least 1")
    if tp > 1 and not _takes(entry, "tp"):
        raise Unsupported(f"tp {tp}", f"device {device!r} has no tensor parallelism")
    return {"tp": tp} if tp > 1 else {}


def _takes(entry: Entry, option: str) -> bool:
    parameters = inspect.signature(entry.create).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _points() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if points.setdefault(point.name, point).value != point.value:
            other = points[point.name].value
            raise DeviceError(f"two packages offer a backend named {point.name!r}: {other} and {point.value}")
    return points


def _probe(point: EntryPoint) -> Discovered:
    try:
        return Discovered(point.name, point.load().probe(), None)
    except Exception as e:
        return Discovered(point.name, None, f"{type(e).__name__}: {e}")


def _best(emulate: bool) -> str:
    seen = discover()
    usable = [(d.found.rank, d.name) for d in seen if d.found and d.found.rank >= 0 and d.why_not(emulate) is None]
    if not usable:
        raise DeviceUnavailable(f"device is 'auto' and no backend can be used:\n{_listing(seen, emulate)}")
    return max(usable)[1]


def _listing(seen: list[Discovered], emulate: bool) -> str:
    lines = []
    for d in seen:
        reason = d.why_not(emulate)
        lines.append(f"  {d.name}: " + (f"not usable, {reason}" if reason else d.found.detail if d.found else ""))
    return "\n".join(lines) or "  (no backend is installed)"


def _check_version(name: str, entry: Any) -> None:
    version = getattr(entry, "protocol", None)
    if version is None or version[0] != PROTOCOL_VERSION[0] or version[1] > PROTOCOL_VERSION[1]:
        raise ProtocolDrift(f"backend {name!r} was written for protocol {version}; this core has {PROTOCOL_VERSION}")


def _drift(title: str, contract: type, obj: Any) -> list[str]:
    wanted = {n: v for n, v in vars(contract).items() if not n.startswith("_") and callable(v)}
    offered = {n: v for n in dir(obj) if not n.startswith("_") and callable(v := getattr(obj, n))}
    out = [f"{title}.{n} is missing" for n in wanted if n not in offered]
    out += [f"{title}.{n} is unknown" for n in sorted(offered) if n not in wanted]
    for name in wanted.keys() & offered.keys():
        want, have = _params(wanted[name])[1:], _params(offered[name])
        names, expected = [n for n, _ in have], [n for n, _ in want]
        if names != expected:
            out.append(f"{title}.{name} takes ({', '.join(names)}), expected ({', '.join(expected)})")
        elif any(w and not h for (_, w), (_, h) in zip(want, have, strict=True)):
            out.append(f"{title}.{name} lacks a default that the contract has")
    return out


def _params(fn: Callable[..., Any]) -> list[tuple[str, bool]]:
    """Name, and whether it has a default, of each parameter."""
    return [(p.name, p.default is not p.empty) for p in inspect.signature(fn).parameters.values()]
