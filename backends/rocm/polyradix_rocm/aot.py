"""Compiles every Triton kernel for AMD GPUs that need not be here, and prints what each one takes.

    python -m polyradix_rocm.aot [gfx942 gfx950]

Exits with 1 when a kernel does not compile in time, spills registers or uses scratch memory, wants more LDS than a
block may have, multiplies without the matrix units, or has a float8 that the chip would emulate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from triton.backends.compiler import GPUTarget

from polyradix_rocm.slots import slots_of
from polyradix_torch.triton import launches
from polyradix_torch.triton.aot import Chip, report

MODULE = "polyradix_rocm.aot"
LAUNCHES = f"{MODULE}:every"
SPILLS = {"vgpr_spill_count": "vector registers", "sgpr_spill_count": "scalar registers"}


def served() -> Iterator[launches.Launch]:
    """What the backend launches: products are torch's until some are tuned. Of float8 caches, one head size."""
    yield from launches.of_rows()
    yield from launches.of_attention()
    yield from launches.of_experts()
    yield from launches.of_latent()
    yield from launches.of_quantised()
    yield from launches.of_indexer()
    keys = launches.integers
    yield "64 of 8192 keys", lambda: slots_of(keys(1 << 16), keys(64), keys(65), 16, 8192)


def every() -> Iterator[launches.Launch]:
    """All but what reads through tensor descriptors, which these chips do not have."""
    yield from served()
    yield from launches.of_float8()
    yield from launches.of_products()


def judge(eights: set[str], kernel: Any) -> tuple[dict[str, int], list[str]]:
    """`eights` are the float8 types, as MLIR spells them, that the chip has."""
    code, source = kernel.asm["amdgcn"], kernel.asm["ttir"]
    spilled = {what: _field(code, name) for name, what in SPILLS.items()}
    vectors, scratch = _field(code, "vgpr_count"), _field(code, "private_segment_fixed_size")
    products = [line for line in kernel.asm["ttgir"].splitlines() if "= tt.dot" in line]
    objections = [f"spills {n} {what}" for what, n in spilled.items() if n]
    if scratch:
        objections.append(f"uses {scratch} bytes of scratch a lane")
    if products and ("v_mfma_" not in code or not all("#mma" in line for line in products)):
        objections.append("multiplies without the matrix units")
    if foreign := set(re.findall(r"f8E\w+", source)) - eights:
        objections.append(f"emulates {', '.join(sorted(foreign))}")
    figures = {"vgprs": vectors, "spills": sum(spilled.values()), "scratch": scratch, "mfma": code.count("v_mfma_")}
    return figures, objections


def _field(code: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", code)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {name}")
    return int(found[1])


# Bytes of LDS of a block: AMD's CDNA 3 and CDNA 4 instruction set references.
CHIPS = {
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65_536, partial(judge, {"f8E4M3FNUZ", "f8E5M2FNUZ"})),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 163_840, partial(judge, {"f8E4M3FN", "f8E5M2"})),
}

if __name__ == "__main__":
    sys.exit(report(MODULE, sys.argv[1:] or list(CHIPS), LAUNCHES))
