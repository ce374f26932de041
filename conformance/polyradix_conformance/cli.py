"""The `conform` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from polyradix.backend.protocol import Backend
from polyradix.backend.registry import DeviceError, open_backend
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import Result, report, run, verdict


def main(argv: Sequence[str] | None = None) -> int:
    """0: conformant. 1: not. 2: the command or the backend cannot be used."""
    args = _parser().parse_args(argv)
    cases = [c for c in all_cases() if c.profile == args.profile]
    if not cases:
        profiles = ", ".join(sorted({c.profile for c in all_cases()}))
        print(f"conform: profile is {args.profile!r}; expected one of: {profiles}", file=sys.stderr)
        return 2
    chosen = [c for c in cases if args.only in c.id]
    if args.command == "list":
        print("\n".join(c.id for c in chosen))
        return 0 if chosen else 1
    return _run(args, chosen, partial=len(chosen) < len(cases))


def _run(args: argparse.Namespace, cases: list[Case], partial: bool) -> int:
    def open(tp: int) -> Backend:
        ranks = {} if tp == 1 else {"tp": tp}
        return open_backend(args.backend, emulate=args.emulate, **ranks, **dict(args.option))

    try:
        backend = open(1)
    except (DeviceError, TypeError, ValueError) as e:
        print(f"conform: {e}", file=sys.stderr)
        return 2
    results = run(cases, lambda tp: backend if tp == 1 else open(tp), lambda r: _show(r, args.verbose))
    made = report(backend, args.backend, dict(args.option), args.profile, partial, results)
    if args.output:
        args.output.write_text(json.dumps(made, indent=1) + "\n")
    counts = ", ".join(f"{n} {status}" for status, n in sorted(made["counts"].items()))
    reason = verdict(results)
    stamps = "".join(f" [{s}]" for s, on in (("partial", partial), ("emulated", backend.caps.emulated)) if on)
    title = f"{args.backend} on {backend.caps.device}, {args.profile}{stamps}"
    print(f"{title}: {reason or 'conformant'} ({counts or 'none'})")
    return 1 if reason else 0


def _show(r: Result, verbose: bool) -> None:
    if verbose or not r.good:
        ratio = "" if r.error_to_floor is None else f" error/floor {r.error_to_floor:.2f}"
        print(f"{r.status:11} {r.id} {r.seconds:.2f}s{ratio} {r.detail}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conform", description="Is a Polyradix backend right?")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run the cases on a backend"), ("list", "print the ids of the cases")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--profile", default="dense")
        command.add_argument(
            "--only", default="", metavar="TEXT", help="cases whose id contains TEXT; stamps `partial`"
        )
    run_ = commands.choices["run"]
    run_.add_argument("--backend", required=True, help="entry-point name in polyradix.backends")
    run_.add_argument("--emulate", action="store_true", help="allow a backend to run without its hardware")
    run_.add_argument(
        "--option", action="append", default=[], type=_option, metavar="KEY=VALUE", help="an option of the backend"
    )
    run_.add_argument("-o", "--output", type=Path, help="write the report as JSON")
    run_.add_argument("-v", "--verbose", action="store_true", help="print every case")
    return parser


def _option(text: str) -> tuple[str, str | int]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


if __name__ == "__main__":
    sys.exit(main())
