"""Compiles every Triton kernel for NVIDIA GPUs that need not be here, and prints what each one takes.

    python -m polyradix_cuda.aot [sm_80 sm_90 sm_100 sm_120]

Exits with 1 when a kernel does not compile in time, spills registers, or wants more shared memory than a
block may have.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from polyradix_torch.triton.aot import Chip, report

MODULE = "polyradix_cuda.aot"
LAUNCHES = "polyradix_torch.triton.launches:every"


def judge(kernel: Any) -> tuple[dict[str, int], list[str]]:
    """Registers, and bytes of stack a thread: spilled registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump says no registers: {out!r}")
    registers, stack = map(int, found.groups())
    return {"registers": registers, "stack": stack}, [f"spills {stack} bytes a thread"] if stack else []


CHIPS = {
    f"sm_{arch}": Chip(GPUTarget("cuda", arch, 32), shared, judge)
    for arch, shared in ((80, 166_912), (90, 232_448), (100, 232_448), (120, 101_376))
}

if __name__ == "__main__":
    sys.exit(report(MODULE, sys.argv[1:] or list(CHIPS), LAUNCHES))
