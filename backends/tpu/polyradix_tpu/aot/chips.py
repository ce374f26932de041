"""The chips that can be compiled for, and meshes of devices that are not here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

GIB = 1 << 30
QUIET = {  # libtpu looks for none of the machine's TPUs, and shares the machine with other processes
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not dumped
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class Chip:
    """One JAX device of a kind. `hbm` is what the compiler lets one program have (it names the limit when a program
    exceeds it), `bandwidth` is `pltpu.get_tpu_info`'s in bytes/s, of a core where a device has two; `clock` in Hz is
    derived from that peak's products a cycle."""

    name: str
    topologies: tuple[tuple[int, str], ...]  # devices, name; smallest first
    hbm: int
    bandwidth: float
    clock: float
    bundles: float | None = None  # fewer than these a token, of 1 KiB of keys and values, in the decode kernel


CHIPS = {
    c.name: c
    for c in (
        Chip("v5e", ((4, "2x2"), (8, "2x4"), (16, "4x4")), int(15.75 * GIB), 0.82e12, 1.5e9, 2.5),
        Chip("v6e", ((4, "2x2"), (8, "2x4"), (16, "4x4")), int(31.25 * GIB), 1.64e12, 1.75e9),
        Chip("v5p", ((4, "2x2x1"), (8, "2x2x2"), (16, "2x2x4")), int(95.74 * GIB), 1.23e12, 1.75e9),
        Chip("tpu7x", ((8, "2x2x1"), (16, "2x2x2")), int(94.75 * GIB), 3.7e12, 2.2e9),
    )
}


def prepare() -> None:
    """The environment, which must be set before JAX starts. Raises RuntimeError when libtpu is missing."""
    if find_spec("libtpu") is None:
        raise RuntimeError("libtpu is not installed; pip install 'polyradix-tpu[aot]' (proprietary: see docs/tpu.md)")
    os.environ.update(QUIET)


@cache  # devices of two descriptions are not the same ones
def topology(chip: Chip, tp: int) -> Any:
    """The mesh of `tp` devices of a chip. Raises ValueError if no topology here is large enough."""
    from jax.experimental import topologies

    from polyradix_tpu.mesh import make_mesh

    names = [name for count, name in chip.topologies if count >= tp]
    if not names:
        raise ValueError(f"tp is {tp}; expected at most {chip.topologies[-1][0]} on {chip.name}")
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{names[0]}")
    return make_mesh(found.devices, tp)
