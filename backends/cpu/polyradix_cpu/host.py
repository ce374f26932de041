"""The machine: its processor, and the memory this process may use. Reads files only, imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from polyradix.backend.protocol import Memory

ROOT = Path("/")
SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


def processor(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """Name, and those of SETS that it has, weakest first. Linux; elsewhere the machine's architecture and nothing."""
    fields = _fields(root / "proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", os.uname().machine), tuple(s for s in SETS if s in flags)


def memory(root: Path = ROOT) -> Memory:
    """What is free for this process and what it could ever have: the machine's memory, cut by its control groups."""
    fields = _fields(root / "proc/meminfo")
    if not fields:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(free=total // 2, total=total)
    total, free = (1024 * int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    for folder in _groups(root):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(folder / limit_file).strip()
            if limit.isdigit():
                used = int(_read(folder / used_file).strip() or 0) - _reclaimable(folder)
                total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    return Memory(free=free, total=total)


def _groups(root: Path) -> list[Path]:
    """The control groups of this process and all above them, version 2 and version 1's memory hierarchy."""
    out = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base = root / "sys/fs/cgroup" / controllers
            parts = [part for part in path.split("/") if part]
            out += [base.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
    return out


def _reclaimable(folder: Path) -> int:
    """Bytes of file cache counted as used that the kernel gives back on demand."""
    pairs = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return sum(int(value) for name, value in pairs if name in ("inactive_file", "active_file"))


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines; of repeated names the first."""
    out: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            out.setdefault(name.strip(), value.strip())
    return out


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
