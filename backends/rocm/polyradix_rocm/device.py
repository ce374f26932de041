"""The entry point of the ROCm backend: a cheap probe, and which chip this is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Backend, Found

DRIVER = Path("/dev/kfd")
ARCHS = {"gfx942": "MI300X, MI300A, MI325X", "gfx950": "MI350X, MI355X"}  # that kernels are compiled for in the tests
VERSIONS = ("0.1.10", "0.1.20")  # of AITER
OLDEST = (2, 10)  # torch whose products of bfloat16 give float32 over rocBLAS too: pytorch, pull request 162600
PLATFORMS = ("auto", "cpu", "gpu")


class Entry:
    """See polyradix.backend.registry."""

    protocol = (1, 0)

    def probe(self) -> Found:
        missing = [name for name in ("torch", "triton") if find_spec(name) is None]
        if missing:
            hint = ": torch for ROCm brings it, and to emulate, pip install triton" if missing == ["triton"] else ""
            return Found(False, f"{' and '.join(missing)} not installed{hint}")
        if DRIVER.exists():
            return Found(True, f"AMD driver found ({DRIVER})", rank=20)
        detail = f"no AMD driver ({DRIVER}); AITER can be simulated"
        return Found(True, detail, rank=-1, emulated=True, options={"simulate": "gfx942"})

    def create(
        self,
        capture: bool | int = True,
        index: int = 0,
        simulate: str = "",
        aiter: str = "0.1.20",
        platform: str = "auto",
        tp: int = 1,
    ) -> Backend:
        """`capture` 0 runs every step eagerly. `index` is the GPU's, or of `tp` GPUs the first one's. `simulate` is the
        architecture to simulate AITER for, in version `aiter`, on `platform`: cpu, gpu (any that torch has), or auto.
        Raises RuntimeError when the GPU cannot be used."""
        _choice("simulate", simulate, ("", *ARCHS))
        _choice("aiter", aiter, VERSIONS)
        _choice("platform", platform, PLATFORMS)
        from polyradix_rocm import backend

        if not simulate:
            return backend.create(bool(capture), index, tp)
        if tp > 1:
            raise Unsupported(f"tp {tp}", "AITER is simulated on one device")
        return backend.emulate(simulate, aiter, platform)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(filter(None, allowed))}")


def check_torch(torch: Any) -> None:
    """Raises RuntimeError for a torch without ROCm, and for one too old."""
    if torch.version.hip is None:
        raise RuntimeError(f"torch {torch.__version__} is not built for ROCm: install one from pytorch.org that is")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
        raise RuntimeError(f"torch is {torch.__version__}; expected at least 2.10")


def arch_of(torch: Any, index: int) -> str:
    """The architecture of GPU `index`, for example gfx942. Raises RuntimeError for one without kernels."""
    arch = str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    if arch not in ARCHS:
        known = ", ".join(f"{name} ({chips})" for name, chips in ARCHS.items())
        raise RuntimeError(f"GPU {index} is a {arch}; expected one of: {known}")
    return arch
