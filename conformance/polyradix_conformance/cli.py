"""The `conform` command."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyradix_conformance import mustpass, report, waivers
from polyradix_conformance.arguments import add_backend, count, seconds
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.matrix import cli as matrix
from polyradix_conformance.perf import cli as perf
from polyradix_conformance.runner import Result
from polyradix_conformance.supervisor import Job, Refused, supervise
from polyradix_conformance.verify import case_problems, shortened, verify


class UsageError(Exception):
    """The command cannot be done as asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: conformant, or done. 1: not. 2: the command, a file or the backend cannot be used."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.func(args)
        sys.stdout.flush()
        return code
    except (UsageError, Refused, waivers.WaiverError) as e:
        print(f"conform: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `conform list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _of_profile(profile: str) -> list[Case]:
    known = sorted({c.profile for c in all_cases()})
    if profile not in known:
        raise UsageError(f"profile is {profile!r}; expected one of: {', '.join(known)}")
    return [c for c in all_cases() if c.profile == profile]


def _selected(args: argparse.Namespace) -> tuple[list[Case], bool]:
    """The cases asked for, and whether these are only some."""
    cases = _of_profile(args.profile)
    chosen = [c for c in cases if args.only in c.id]
    if not chosen:
        raise UsageError(f"no case of profile {args.profile!r} has {args.only!r} in its id")
    return chosen, len(chosen) < len(cases)


def _list(args: argparse.Namespace) -> int:
    print("\n".join(c.id for c in _selected(args)[0]))
    return 0


def _run(args: argparse.Namespace) -> int:
    cases, partial = _selected(args)
    waived = waivers.load(args.waivers, {c.id for c in _of_profile(args.profile)}) if args.waivers else {}
    if args.output:
        _clear(args.output)
    start = time.monotonic()
    job = Job(args.backend, args.emulate, dict(args.option))
    show = _Show([c.id for c in cases], args.verbose, args.jobs == 1)
    claims, results = supervise(job, show.ids, args.timeout, show, args.jobs)
    made = report.build(job, claims, args.profile, partial, cases, results, waived, time.monotonic() - start)
    if args.output:
        report.write(made, args.output)
    return _judge(made)


def _clear(path: Path) -> None:
    """A report of before must not be taken for one of a run that did not get to its end."""
    try:
        path.unlink(missing_ok=True)
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror}") from e


def _judge(made: report.Report) -> int:
    wrong = case_problems(made, report.today())
    shown = {c["id"] for c in made["cases"] if c["status"] in ("fail", "error") and not c["waiver"]}  # as they came
    for line in shortened([text for id, text in wrong.items() if id not in shown]):
        print(line)
    if not made["counts"].get("pass"):
        verdict = "NOT conformant: no case passed"
    elif wrong:
        verdict = f"NOT conformant: {len(wrong)} of {len(made['cases'])} cases"
    else:
        verdict = "passed, but only some cases were run" if made["partial"] else "conformant"
    counts = ", ".join(f"{n} {status}" for status, n in sorted(made["counts"].items()))
    stamps = "".join(f" [{s}]" for s in ("partial", "emulated") if made[s])
    print(f"{made['backend']} on {made['device']}, {made['profile']}{stamps}: {verdict} ({counts})")
    return 0 if made["counts"].get("pass") and not wrong else 1


class _Show:
    """Prints results as they come, and on a terminal how many there are and, of one process, the case in progress."""

    def __init__(self, ids: list[str], verbose: bool, alone: bool) -> None:
        self.ids, self._verbose, self._alone, self._done = ids, verbose, alone, 0
        self._live = sys.stdout.isatty()
        self._progress()

    def __call__(self, r: Result) -> None:
        self._done += 1
        if self._verbose or r.status in ("fail", "error"):
            ratio = "" if r.error_to_floor is None else f" error/floor {r.error_to_floor:.2f}"
            line = f"{r.status:11} {r.id} {r.seconds:.2f}s{ratio} {r.detail}"
            print("\r\x1b[K" * self._live + line, flush=True)
        self._progress()

    def _progress(self) -> None:
        if self._live:
            left = self.ids[self._done :]
            line = f"{self._done}/{len(self.ids)} {left[0] if self._alone else ''}" if left else ""
            print(f"\r\x1b[K{line[:78]}", end="", flush=True)


def _verify(args: argparse.Namespace) -> int:
    return max([verify(path) for path in args.reports])


def _mustpass(args: argparse.Namespace) -> int:
    profiles = [args.profile] if args.profile else sorted({c.profile for c in all_cases()})
    for profile in profiles:
        text = mustpass.lines(_of_profile(profile))
        if args.write:
            mustpass.path(profile).write_text(text)
            print(f"{mustpass.path(profile)}: {text.count(chr(10))} cases")
        else:
            print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conform", description="Is a Polyradix backend right?")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, func: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(func=func)
        return made

    run = command("run", _run, "run the cases of a profile on a backend")
    add_backend(run)
    run.add_argument("-o", "--output", type=Path, help="write the report as JSON")
    run.add_argument("--timeout", type=seconds, default=120.0, metavar="S", help="seconds that a case has (120)")
    run.add_argument("--jobs", type=count, default=1, metavar="N", help="processes that share the cases (1)")
    run.add_argument("--waivers", type=Path, metavar="FILE", help="known failures, as TOML")
    run.add_argument("-v", "--verbose", action="store_true", help="print every case")
    for each in (run, command("list", _list, "print the ids of the cases of a profile")):
        each.add_argument("--profile", default="dense")
        each.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their id; stamps `partial`")
    check = command("verify", _verify, "say of reports whether they count as conformant")
    check.add_argument("reports", nargs="+", type=Path, metavar="report.json")
    lists = command("mustpass", _mustpass, "print the must-pass list, or write it into the suite (for its maintainers)")
    lists.add_argument("--profile", help="of this profile only")
    lists.add_argument("--write", action="store_true")
    matrix.add_parser(commands)
    perf.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
