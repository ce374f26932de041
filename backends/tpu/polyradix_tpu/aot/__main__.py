"""Compiles a model's step and every kernel for TPUs that need not be here, and prints what each program takes.

    python -m polyradix_tpu.aot --chip v6e --model llama-3.1-8b --tp 4

Exits with 1 when a gate fails, which it names, and with 2 when it cannot begin.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from polyradix.graph.errors import ModelError
from polyradix_tpu.aot.chips import CHIPS, prepare


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("python -m polyradix_tpu.aot", description=summary)
    parser.add_argument("--chip", choices=[*CHIPS, "all"], default="all")
    parser.add_argument("--model", default="llama-3.1-8b", help="a name known here, or the path of a config.json")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--kernels", choices=["auto", "xla", "pallas"], default="auto")
    parser.add_argument("--json", type=Path, help="a file for the same table")
    args = parser.parse_args(argv)
    try:
        prepare()
        from polyradix_tpu.aot.gates import table
        from polyradix_tpu.aot.run import run

        rows = run(args.chip, args.model, args.tp, args.kernels)
    except (RuntimeError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return int(any(r.failures for r in rows))


if __name__ == "__main__":
    sys.exit(main())
