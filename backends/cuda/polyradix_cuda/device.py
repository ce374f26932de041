"""The entry point of the CUDA backend: a cheap probe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from polyradix.backend.protocol import Backend, Found

DRIVER = Path("/proc/driver/nvidia/gpus")


class Entry:
    """See polyradix.backend.registry."""

    protocol = (1, 0)

    def probe(self) -> Found:
        missing = [name for name in ("torch", "triton") if find_spec(name) is None]
        if missing:
            return Found(False, f"{' and '.join(missing)} not installed")
        if not Path("/dev/nvidiactl").exists() and not DRIVER.exists():
            return Found(False, "no NVIDIA driver (neither /dev/nvidiactl nor /proc/driver/nvidia)")
        return Found(True, f"NVIDIA driver found, {len(list(DRIVER.glob('*'))) or 'unknown number of'} GPU(s)", rank=20)

    def create(self, capture: bool | int = True, index: int = 0, tp: int = 1) -> Backend:
        """`capture` 0 runs every step eagerly. `index` is the GPU's, or of `tp` GPUs the first one's. Raises
        RuntimeError when it cannot be used."""
        from polyradix_cuda.backend import create

        return create(bool(capture), index, tp)
