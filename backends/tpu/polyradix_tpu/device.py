"""The entry point of the TPU backend: a cheap probe, and the choice of the devices that make up the mesh."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Backend, Found, Memory
from polyradix.backend.registry import DeviceUnavailable

FAKE_DEVICES = 4  # that JAX makes of one CPU
PLATFORMS = ("auto", "tpu", "gpu", "cpu")
DEVICE_FILES = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")


class Entry:
    """See polyradix.backend.registry."""

    protocol = (1, 0)

    def probe(self) -> Found:
        if find_spec("jax") is None:
            return Found(False, "jax is not installed")
        if has_tpu():
            return Found(True, "a TPU", rank=30, options={"platform": "tpu"})
        others = ", ".join([*sorted(p.name for p in entry_points(group="jax_plugins")), "cpu"])
        detail = f"no TPU; JAX has {others}, and runs emulated there with --emulate"
        return Found(True, detail, rank=-1, emulated=True)

    def create(
        self,
        tp: int = 1,
        platform: str = "auto",
        growth: int | None = None,
        warm: bool | int = False,
        kernels: str = "auto",
    ) -> Backend:
        """`platform`: auto is the best that JAX finds. `growth`: how many times larger each size of batch is than the
        one before; None is 2 on a TPU, and 4 elsewhere, to compile less. `warm`, or POLYRADIX_TPU_WARM in the
        environment: the first step compiles the programs of all sizes of batch; otherwise each is compiled when it is
        first met. `kernels`: pallas, xla, or auto: Pallas on a TPU where it takes the shape, else XLA. Elsewhere Pallas
        is interpreted. Where compiled programs are kept, JAX says: JAX_COMPILATION_CACHE_DIR."""
        if tp < 1:
            raise ValueError(f"tp is {tp}; expected at least 1")
        if platform not in PLATFORMS:
            raise ValueError(f"platform is {platform!r}; expected one of {', '.join(PLATFORMS)}")
        if growth is not None and growth < 2:
            raise ValueError(f"growth is {growth}; expected at least 2")
        devices = open_devices(platform)
        if tp > len(devices):
            names = ", ".join(map(str, devices))
            more = "; set JAX_NUM_CPU_DEVICES before jax starts for more" if devices[0].platform == "cpu" else ""
            raise Unsupported(f"tp {tp}", f"JAX has {len(devices)} devices: {names}{more}")
        from polyradix_tpu.backend import TPUBackend

        return TPUBackend(devices, tp, growth, bool(warm or os.environ.get("POLYRADIX_TPU_WARM")), kernels)


def has_tpu(root: Path = Path("/")) -> bool:
    """A TPU's device file, its library, and no JAX_PLATFORMS that leaves TPUs out. Starts nothing."""
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"
    there = any(next(root.glob(pattern), None) for pattern in DEVICE_FILES)
    return there and find_spec("libtpu") is not None and "tpu" in wanted.split(",")


def open_devices(platform: str) -> list[Any]:
    """The devices of one platform; starts JAX. A CPU is split into FAKE_DEVICES, unless JAX is already running."""
    os.environ.setdefault("NPROC", str(max(2 * FAKE_DEVICES, os.cpu_count() or 1)))  # fewer threads deadlock a mesh
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        _split_cpu(jax)
    try:
        return list(jax.devices(None if platform == "auto" else platform))
    except RuntimeError as e:
        names = ", ".join(f"{d} ({d.device_kind})" for d in jax.devices())
        hint = "; use it with --emulate and platform=auto" if platform == "tpu" else ""
        raise DeviceUnavailable(f"JAX finds no {platform.upper()}, only {names}{hint}") from e


def _split_cpu(jax: Any) -> None:
    try:
        if jax.config.jax_num_cpu_devices <= 0:
            jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
    except RuntimeError:
        return  # JAX is already running


def host_memory(root: Path = Path("/")) -> Memory:
    """Of the host, for devices that have none of their own. Linux; elsewhere half of it counts as free."""
    file = root / "proc/meminfo"
    if not file.exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total // 2, total)
    fields = dict(line.split(":") for line in file.read_text().splitlines())
    free, total = (1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return Memory(free, total)
