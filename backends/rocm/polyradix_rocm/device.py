"""The entry point of the ROCm backend: a cheap probe, and which chip this is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyradix.backend.protocol import Backend, Found

DRIVER = Path("/dev/kfd")
ARCHS = {"gfx942": "MI300X, MI300A, MI325X", "gfx950": "MI350X, MI355X"}  # that kernels are compiled for in the tests


class Entry:
    """See polyradix.backend.registry."""

    protocol = (1, 0)

    def probe(self) -> Found:
        missing = [name for name in ("torch", "triton") if find_spec(name) is None]
        if missing:
            return Found(False, f"{' and '.join(missing)} not installed")
        if not DRIVER.exists():
            return Found(False, f"no AMD driver ({DRIVER})")
        return Found(True, f"AMD driver found ({DRIVER})", rank=20)

    def create(self, capture: bool | int = True, index: int = 0) -> Backend:
        """`capture` 0 runs every step eagerly. `index` is the GPU's. Raises RuntimeError when it cannot be used."""
        from polyradix_rocm.backend import create

        return create(bool(capture), index)


def arch_of(torch: Any, index: int) -> str:
    """The architecture of GPU `index`, for example gfx942. Raises RuntimeError for a torch without ROCm and for an
    architecture that no kernel was compiled for."""
    if torch.version.hip is None:
        raise RuntimeError(f"torch {torch.__version__} is not built for ROCm: install one from pytorch.org that is")
    arch = str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    if arch not in ARCHS:
        known = ", ".join(f"{name} ({chips})" for name, chips in ARCHS.items())
        raise RuntimeError(f"GPU {index} is a {arch}; expected one of: {known}")
    return arch
