"""The entry point of the Ascend backend: a cheap probe that says what is missing, and the start of torch-npu."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which

from polyradix.backend.protocol import Backend, Found
from polyradix.backend.registry import DeviceUnavailable

ROOT = Path("/")
WHEEL = "pip install 'polyradix-npu[npu]'"
SOURCE = "source set_env.sh of the CANN toolkit"


class Entry:
    """See polyradix.backend.registry."""

    protocol = (1, 0)

    def probe(self) -> Found:
        missing = next(obstacles(), None)
        if missing is None:
            count = len(list((ROOT / "dev").glob("davinci[0-9]*")))
            return Found(True, f"CANN and {count} Ascend device(s) found", rank=25)
        if (_installed("torch-npu") and _installed("torch")) and which("gcc") and which("nm"):
            detail = f"{missing}; it runs emulated here"
            return Found(True, detail, rank=-1, emulated=True, options={"emulated": True})
        return Found(False, missing)

    def create(self, capture: bool | int = True, index: int = 0, emulated: bool | int = False, tp: int = 1) -> Backend:
        """`capture` 0 runs every step eagerly. `index` is the device's, or of `tp` devices the first one's. `emulated`:
        a device in host memory, see docs/npu.md. Raises DeviceUnavailable, with the remedy, when the device cannot be
        used."""
        start(bool(emulated))
        from polyradix_npu.backend import create

        return create(bool(capture), index, bool(emulated), tp)


def obstacles() -> Iterator[str]:
    """What keeps torch-npu from a device here, each with its remedy. Imports nothing."""
    torch, wheel = _installed("torch"), _installed("torch-npu")
    if wheel is None:
        yield f"torch-npu is not installed: {WHEEL}, for the torch that it names"
        return
    if torch is None or torch.split("+")[0].split(".")[:2] != wheel.split(".")[:2]:
        release = ".".join(wheel.split(".")[:2])
        yield f"torch {torch or 'missing'} does not fit torch-npu {wheel}: pip install 'torch=={release}.*'"
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if not any((Path(folder) / "libhccl.so").exists() for folder in folders if folder):
        hint = "; until then even `import torch` fails, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set"
        yield f"CANN's libraries are not on LD_LIBRARY_PATH: {SOURCE}{hint}"
    if not any((ROOT / "dev").glob("davinci[0-9]*")):
        yield "no Ascend device (/dev/davinci*): install the driver, and pass the device into the container"


def start(emulated: bool) -> None:
    """Imports torch and torch-npu. Raises DeviceUnavailable, saying what is wrong and its remedy."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch would import torch-npu, and fail without CANN
    if emulated:
        from polyradix_npu.emulate import standins

        standins.load()
    try:
        import torch
        import torch_npu  # noqa: F401
    except Exception as error:
        reasons = "; ".join(obstacles()) or f"{SOURCE}, and see that its version fits torch-npu"
        raise DeviceUnavailable(f"torch-npu cannot be imported ({str(error).splitlines()[0]}): {reasons}") from error
    if not torch.npu.is_available():
        raise DeviceUnavailable("torch-npu finds no Ascend device: see that `npu-smi info` lists one")


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
