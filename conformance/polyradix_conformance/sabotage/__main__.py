"""Prints `name killed by id` for every sabotage; exits 1 when one survives."""

from __future__ import annotations

import sys

from polyradix_conformance.cases import all_cases
from polyradix_conformance.sabotage import all_sabotages, killer


def main() -> int:
    survivors, cases = 0, all_cases()
    for this in all_sabotages():
        if this.process:
            print(f"{this.name:24} needs a supervisor: {this.text}")
            continue
        result = killer(this, cases)
        survivors += result is None
        print(f"{this.name:24} {f'killed by {result.id}' if result else 'SURVIVES'}: {this.text}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
