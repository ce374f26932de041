"""The matrix as values: columns made from reports, rows from case ids and needs, cells from the cases of both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from typing import Any

from polyradix_conformance import mustpass, verify
from polyradix_conformance.matrix.evidence import MatrixError

Json = dict[str, Any]

GROUPS = {
    "L0": "L0 surface",
    "L1": "L1 verbs",
    "features": "Features and sizes",
    "L2": "L2 state",
    "L3": "L3 graph",
    "L4": "L4 serving",
    "L5": "L5 mesh",
    "P": "P speed",
}
STATES = {  # state: symbol, words
    "pass": ("✓", "all pass"),
    "some": ("◐", "pass, some declined"),
    "declined": ("○", "declined"),
    "waived": ("△", "some waived"),
    "failed": ("✕", "failed, or does not count"),
    "not_run": ("—", "not run"),
}
STATUSES = {  # status: words
    "pass": "pass",
    "unsupported": "declined",
    "waived": "waived",
    "not_run": "not run",
    "fail": "fail",
    "error": "error",
}
SHOWN = 3  # reasons of a report that are no single case's


@dataclass(frozen=True, order=True)
class Row:
    """`rank` and `number` put sizes in order and features before sizes; a group's own row has no name."""

    group: str
    rank: int = 0
    number: int = 0
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or GROUPS.get(self.group, self.group)

    @property
    def heading(self) -> bool:
        return not self.name

    @property
    def counted(self) -> bool:
        """The headings of features and of speed are not: a case may be in several rows below."""
        return not self.heading or self.group not in ("features", "P")

    @property
    def slug(self) -> str:
        return slug(f"{self.group} {self.name}")


@dataclass(frozen=True)
class Cell:
    """`worst` is the largest error over floor; `shares` are of the roofline, of the timed cases that also passed."""

    state: str
    passed: int = 0
    total: int = 0
    worst: float | None = None
    cases: list[int] = field(default_factory=list)
    perf: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    perf_failed: bool = False

    @property
    def symbol(self) -> str:
        return STATES[self.state][0]

    @property
    def words(self) -> str:
        return STATES[self.state][1]

    @property
    def roofline(self) -> str:
        """For example `41-63 %`, the range over the verb's timed cases; empty when nothing was timed."""
        percents = [round(100 * share) for share in self.shares]
        ends = sorted({min(percents), max(percents)}) if percents else []
        parts = ["-".join(map(str, ends)) + " %"] * bool(ends) + ["timing failed"] * self.perf_failed
        return ", ".join(parts)


@dataclass
class Column:
    """A backend on a device: its newest report of each profile, and its newest timings in each dtype."""

    slug: str
    reports: list[Json]
    perf: list[Json]

    @property
    def last(self) -> Json:
        return max(self.reports, key=when)

    @property
    def facts(self) -> dict[str, str]:
        """What it ran with and what it claims, of its newest report, as text by name."""
        r = self.last
        machine = {k: v for k, v in r["machine"].items() if k != "packages"}
        named = {"options": r["options"], "notes": r["notes"], **r["caps"], **machine, **r["machine"]["packages"]}
        return {name: _plain(value) for name, value in named.items()}

    @cached_property
    def cases(self) -> list[Json]:
        return [c for r in self.reports for c in r["cases"]]

    @cached_property
    def timed(self) -> list[Json]:
        return [c for p in self.perf for c in p["cases"]]


@dataclass(frozen=True)
class Matrix:
    columns: list[Column]
    rows: list[Row]
    cells: dict[tuple[Row, str], Cell]  # by row, and the slug of the column
    notes: list[str]

    def cell(self, row: Row, column: Column) -> Cell:
        return self.cells.get((row, column.slug), Cell("not_run"))


def build(evidence: list[tuple[str, Json]], today: date) -> Matrix:
    """From (file name, report or perf file) pairs, judged as of `today`. Raises MatrixError when none is a report."""
    reports = [(n, judged(d, today)) for n, d in evidence if "profile" in d]
    timings = [(n, d) for n, d in evidence if "profile" not in d]
    if not reports:
        raise MatrixError("no report among the files; expected at least one from `conform run -o`")
    notes: list[str] = []
    by_column: dict[tuple[str, ...], list[Json]] = {}
    for report in _newest(reports, lambda d: (*identity(d), d["profile"]), notes):
        by_column.setdefault(identity(report), []).append(report)
    perf: dict[tuple[str, ...], list[Json]] = {}
    for timing in _newest(timings, lambda d: (*identity(d), *d["ceilings"]["gflop_s"]), notes):
        perf.setdefault(identity(timing), []).append(timing)
    columns: list[Column] = []
    for key in sorted(by_column):
        name, taken = slug(key[0]), {c.slug for c in columns}
        free = next(s for s in (name, *(f"{name}-{n}" for n in range(2, 999))) if s not in taken)
        columns.append(Column(free, sorted(by_column[key], key=lambda r: str(r["profile"])), perf.pop(key, [])))
    notes += [
        f"{d['backend']} on {d['device']}: timed on {day(d)}, but has no report; not shown"
        for each in perf.values()
        for d in each
    ]
    suites = sorted({str(r["suite"]) for c in columns for r in c.reports})
    if len(suites) > 1:
        notes.append(f"The reports come from suites {', '.join(suites)}; the number of cases may differ between them")
    return _fill(columns, notes)


def _fill(columns: list[Column], notes: list[str]) -> Matrix:
    cells: dict[tuple[Row, str], Cell] = {}
    for column in columns:
        found = _by_row((n, row) for n, case in enumerate(column.cases) for row in rows_of(case))
        verbs = {row.name: row for row in found if row.group == "L1"}
        subjects = ((n, c["id"].split("/")[:2][-1]) for n, c in enumerate(column.timed))
        timed = _by_row((n, verbs.get(name, Row("P", 1, 0, name))) for n, name in subjects)
        for row in found | timed:
            cells[row, column.slug] = _cell(column, found.get(row, []), timed.get(row, []))
    named = {row for row, _ in cells}
    order = list(GROUPS)
    rows = sorted(
        named | {Row(r.group) for r in named}, key=lambda r: (order.index(r.group) if r.group in order else 99, r)
    )
    return Matrix(columns, rows, cells, notes)


def _by_row(pairs: Iterable[tuple[int, Row]]) -> dict[Row, list[int]]:
    out: dict[Row, list[int]] = {}
    for n, row in pairs:
        out.setdefault(row, []).append(n)
    return out


def _cell(column: Column, cases: list[int], perf: list[int]) -> Cell:
    """Of a row's cases, and of its timed ones, by their numbers in the column. Timings alone count as cases."""
    timed = [column.timed[i] for i in perf]
    counted = [column.cases[i] for i in cases] or timed
    return Cell(
        state_of(counted),
        sum(c["status"] == "pass" for c in counted),
        len(counted),
        max((c["error_to_floor"] for c in counted if c.get("error_to_floor") is not None), default=None),
        cases,
        perf,
        [c["share"] for c in timed if c["status"] == "pass"],
        any(c["status"] in ("fail", "error") for c in timed),
    )


def state_of(cases: Iterable[Json]) -> str:
    """A key of STATES: the worst thing that is true of any case."""
    seen = {"fail" if c.get("problem") and c["status"] != "not_run" else c["status"] for c in cases}
    if seen & {"fail", "error"}:
        return "failed"
    if "not_run" in seen or not seen:
        return "not_run"
    if "waived" in seen:
        return "waived"
    if seen == {"unsupported"}:
        return "declined"
    return "some" if "unsupported" in seen else "pass"


def rows_of(case: Json) -> Iterator[Row]:
    """Where a case counts: its layer, its subject, and what it needs. A feature's own subject is one row, not two."""
    layer, subject = (*case["id"].split("/"), "")[:2]
    needs = case["needs"]
    features = needs["features"]
    yield Row(layer)
    if subject and subject not in features:
        yield Row(layer, 1, 0, subject)
    for name in features:
        yield Row("features", 3, 0, name)
    yield Row("features", 4, 0, needs["dtype"])
    yield Row("features", 5, needs["head_dim"], f"head size {needs['head_dim']}")
    if needs["page_size"] is not None:
        yield Row("features", 6, needs["page_size"], f"page size {needs['page_size']}")
    if needs["tp"] > 1:
        yield Row("features", 7, needs["tp"], f"tensor parallel {needs['tp']}")


def subject_of(case: Json) -> Row:
    """The row of a case's own subject."""
    return next(r for r in rows_of(case) if not r.heading)


def judged(report: Json, day: date) -> Json:
    """The report with its `verdict`, the `reasons` why `conform verify` would not take it on that day, and with each
    case's `problem`."""
    every = verify.problems(report, day)
    known = report["profile"] in mustpass.profiles()
    wrong = verify.case_problems(report, day) if known else {}
    own = [reason for reason in every if reason not in wrong.values()]
    reasons = own[:SHOWN] + [f"and {len(own) - SHOWN} more like these"] * (len(own) > SHOWN)
    if wrong:
        reasons.append(f"{len(wrong)} of {len(report['cases'])} cases failed, or do not count")
    cases = [{**c, "problem": wrong.get(c["id"], "").removeprefix(f"{c['id']}: ")} for c in report["cases"]]
    waived = any(c["status"] == "waived" for c in cases)
    verdict = "not conformant" if reasons else "conformant, with waivers" if waived else "conformant"
    return {**report, "cases": cases, "reasons": reasons, "verdict": verdict}


def identity(data: Json) -> tuple[str, ...]:
    """What makes a column: a run on another device, with other options or emulated says nothing about this one."""
    options = ", ".join(f"{k}={v}" for k, v in sorted(data["options"].items()))
    return (data["backend"], "emulated" if data["emulated"] else "", data["device"], options)


def _newest(files: list[tuple[str, Json]], key: Any, notes: list[str]) -> list[Json]:
    best: dict[Any, tuple[str, Json]] = {}
    for name, data in sorted(files, key=lambda f: when(f[1])):
        if key(data) in best:
            old, older = best[key(data)]
            notes.append(f"{old} ({older['backend']}, {day(older)}) is older than {name} and not counted")
        best[key(data)] = name, data
    return [data for _, data in best.values()]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{k}={v}" for k, v in sorted(value.items())]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def when(data: Json) -> datetime:
    return datetime.fromisoformat(data["date"])


def day(data: Json) -> str:
    return when(data).date().isoformat()


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def counts(report: Json) -> str:
    """For example `212 pass, 4 declined`, from the cases themselves."""
    seen = Counter(c["status"] for c in report["cases"])
    return ", ".join(f"{seen[s]} {words}" for s, words in STATUSES.items() if seen[s])
