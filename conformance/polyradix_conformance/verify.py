"""Says of a report whether it counts as conformant. Knows no vendor and opens no backend."""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from polyradix.backend.protocol import PROTOCOL_VERSION
from polyradix_conformance import mustpass
from polyradix_conformance.report import Report, ReportError, load, today
from polyradix_conformance.waivers import Waiver

SHOWN = 20


def verify(path: Path) -> int:
    """Prints what is wrong with a file, or that nothing is. 0: conformant. 1: not. 2: not a report."""
    try:
        report = load(path)
    except ReportError as e:
        print(f"{path}: {e}")
        return 2
    found = problems(report, today())
    for line in shortened(found):
        print(f"{path}: {line}")
    if not found:
        emulated = " [emulated]" if report["emulated"] else ""
        print(f"{path}: {report['backend']} on {report['device']}, {report['profile']}{emulated}: conformant")
    return 1 if found else 0


def shortened(lines: list[str]) -> list[str]:
    """The first ones, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"and {more} more"] if more > 0 else lines


def problems(report: Report, day: date) -> list[str]:
    """Every reason why a loaded report does not count, on the day `day`."""
    if tuple(report["protocol"]) != PROTOCOL_VERSION:
        return [f"protocol is {_dotted(report['protocol'])}; this suite verifies {_dotted(PROTOCOL_VERSION)}"]
    profile = report["profile"]
    if profile not in mustpass.profiles():
        return [f"profile is {profile!r}; expected one of: {', '.join(mustpass.profiles())}"]
    if report["mustpass"] != mustpass.name(profile):
        return [f"mustpass is {report['mustpass']!r}; expected {mustpass.name(profile)!r}"]
    out = ["partial: only some cases were selected"] if report["partial"] else []
    seen = Counter(c["id"] for c in report["cases"])
    wanted = mustpass.load(profile)
    out += [f"{id}: {n} times in the report" for id, n in seen.items() if n > 1]
    if not report["partial"]:
        out += [f"{id}: missing from the report" for id in wanted if id not in seen]
    counts = Counter(c["status"] for c in report["cases"])
    if counts != report["counts"]:
        out.append(f"counts are {report['counts']}; the cases say {dict(counts)}")
    if not counts["pass"]:
        out.append("no case passed")
    return out + list(case_problems(report, day).values())


def case_problems(report: Report, day: date) -> dict[str, str]:
    """Why a case does not count, by id."""
    wanted = mustpass.load(report["profile"])
    found = ((c["id"], _problem(c, wanted.get(c["id"]), report, day)) for c in report["cases"])
    return {id: f"{id}: {text}" for id, text in found if text}


def _problem(case: dict[str, Any], conditions: tuple[str, ...] | None, report: Report, day: date) -> str | None:
    if conditions is None:
        return f"unknown to {report['mustpass']}"
    waiver = case["waiver"]
    if waiver is None:
        wrong = mustpass.objection(case["status"], conditions, report["caps"])
        if case["status"] == "waived":
            wrong = "waived, but without a waiver"
        return f"{wrong}: {case['detail']}" if wrong and case["detail"] else wrong
    if case["status"] in ("pass", "unsupported"):
        return f"{case['status']}, so its waiver has to go"
    try:
        why_not = Waiver(**{**waiver, "expires": date.fromisoformat(waiver["expires"])}).why_not(
            report["backend"], report["device"], day
        )
    except ValueError as e:
        return f"waiver expires on {waiver['expires']!r}: {e}"
    if why_not is None and case["status"] != "waived":
        return f"{case['status']}: {case['detail']}"
    return why_not


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))
