"""`conform perf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from polyradix.backend.registry import DeviceError, open_backend
from polyradix_conformance import report
from polyradix_conformance.arguments import add_backend, positive
from polyradix_conformance.perf import output, roofline
from polyradix_conformance.perf.cases import SIZES, PerfCase, cases
from polyradix_conformance.perf.measure import Measured, measure

TEXT = "time the verbs at serving shapes, as a share of what the device does at best; speed is never judged"


def add_parser(subparsers: Any) -> None:
    """Adds `perf`, whose func returns 0: every output was right, 1: not, or none was, 2: it could not be run."""
    parser = subparsers.add_parser("perf", help=TEXT, description=TEXT)
    parser.set_defaults(func=run)
    add_backend(parser)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their id, and the probes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--size", default="serving", choices=tuple(SIZES))
    parser.add_argument("--peak-bandwidth", type=positive, metavar="GB/s", help="instead of the read probes")
    parser.add_argument("--peak-flops", type=positive, metavar="GFLOP/s", help="instead of the compute probe")
    parser.add_argument("--seconds", type=positive, default=1.0, metavar="S", help="of timing for each case (1)")
    parser.add_argument("-o", "--output", type=Path, metavar="perf.json")


def run(args: argparse.Namespace) -> int:
    every = cases(args.size, args.dtype)
    chosen = [c for c in every if args.only in c.id]
    if not chosen:
        return _refuse(f"no perf case has {args.only!r} in its id")
    try:
        if args.output:
            args.output.unlink(missing_ok=True)  # an old file must not be taken for this run's
        backend = open_backend(args.backend, emulate=args.emulate, **dict(args.option))
    except (DeviceError, TypeError, ValueError, OSError) as e:
        return _refuse(str(e))
    measured = [_shown(measure(backend, args.dtype, c, args.seconds)) for c in every if c in chosen or _needed(c, args)]
    ceilings = roofline.find(measured, args.peak_bandwidth, args.peak_flops)
    results = [m for m in measured if m.case in chosen]
    partial = len(chosen) < len(every) or args.size != "serving"
    made = output.build(
        args.backend, dict(args.option), backend.caps, args.dtype, partial, args.size, ceilings, results
    )
    if args.output:
        report.write(made, args.output)
    stamps = "".join(f" [{s}]" for s, on in (("partial", partial), ("emulated", backend.caps.emulated)) if on)
    print(f"{args.backend} on {backend.caps.device}{stamps}\n{output.table(made)}")
    return 1 if _wrong(results) else 0


def _needed(case: PerfCase, args: argparse.Namespace) -> bool:
    given = {"read": args.peak_bandwidth, "compute": args.peak_flops}
    return case.probe is not None and given[case.probe] is None


def _wrong(results: list[Measured]) -> bool:
    """An output was wrong, or there was none."""
    return any(m.status in ("fail", "error") for m in results) or not any(m.status == "pass" for m in results)


def _shown(m: Measured) -> Measured:
    """On a terminal, says how far the run is."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{m.status} {m.case.id}"[:90], end="", file=sys.stderr, flush=True)
    return m


def _refuse(reason: str) -> int:
    print(f"conform: {reason}", file=sys.stderr)
    return 2
