"""Small launches of every kernel, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 9 python backends/cuda/tests/gpu/sanitize.py

and the same with --tool synccheck and racecheck. Wanted: exit status 0 and "ERROR SUMMARY: 0 errors"; racecheck may
only name kernels of cuBLAS ("nvjet"). 9 is an error that the tool found, 1 a wrong result or a kernel that was not
launched. Every tensor is an allocation of its own, so
that memcheck sees what is read beyond it; hence no graphs, whose kernels are the same. Run it first without the tool,
which compiles what is not compiled yet.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from triton.runtime.jit import JITFunction

from polyradix.backend.registry import open_backend
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.triton import attention, prefix, rows, skinny

CASES = (  # by subject: cases are small, the tools slow
    r"L1/(embed|last|rms_norm/normal|qk_norm|rope/normal|(linear_|)gated/normal|add(_rms_norm|)/normal|logits/normal|sample/grid)",
    r"L1/attend/(mixed/(normal|window-7|softcap)/|decode/(peaked|window-40)/|dim-80|dim-256|page-1/|page-128)",
    r"L2/(two_steps|copied|linked|exported_then_written)",
)


def products(device: str) -> list[str]:
    """What is wrong with our products, of sizes that no block divides; again after a join."""
    wrong = []
    for kind, count, tile in (
        ("linear", 1, skinny.Tile(4, 512, 4, 2, ahead=256)),
        ("linear", 3, skinny.Tile(4, 512, 4, 2, splits=2)),
        ("gated", 2, skinny.Tile(8, 256, 4, 2, splits=2)),
        ("logits", 13, skinny.Tile(32, 128, 4, 3, splits=2, dot=True)),
        ("gated", 130, skinny.Tile(64, 64, 4, 3, dot=True, tokens=64)),
        ("linear", 130, skinny.Tile(64, 64, 4, 3, splits=2, dot=True, tokens=64)),
    ):
        x, w = (torch.randn(n, 1000, device=device).bfloat16() for n in (count, 202))
        want = x.double() @ w.double().t()
        if kind == "gated":
            gate, up = want.chunk(2, dim=1)
            want = torch.nn.functional.silu(gate) * up
        for _ in range(2):
            torch.cuda.synchronize()
            error = (skinny.product(x, w, None, tile, kind) - want).abs().max() / want.abs().max()
            if not error < 0.01:
                wrong.append(f"{kind} of {count} rows: error {float(error)}")
    return wrong


def main() -> int:
    launched: set[str] = set()
    run = JITFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        launched.add(self.__name__)
        return run(self, *args, **options)

    JITFunction.run = counted
    prefix.LEAST_KEYS, prefix.LEAST_MEMBERS, prefix.LEAST_SAVED = prefix.UNIT, 1, 0  # every long row shares with itself
    backend = open_backend("cuda", capture=0)
    wrong = products("cuda")
    cases = [c for c in all_cases() if c.profile == "dense" and any(re.match(pattern, c.id) for pattern in CASES)]
    for case in cases:
        result = run_case(case, lambda tp: backend)
        if result.status != "pass":
            wrong.append(f"{case.id}: {result.status}: {result.detail}")
    for module in (attention, rows, skinny):
        grids = set(re.findall(r"\b(\w+)\[", Path(module.__file__).read_text()))
        kernels = {name for name, x in vars(module).items() if isinstance(x, JITFunction) and name in grids}
        wrong += [f"{module.__name__}.{name} was not launched" for name in sorted(kernels - launched)]
    torch.cuda.synchronize()
    print("\n".join(wrong) or f"{len(cases)} cases right; kernels: {', '.join(sorted(launched))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
