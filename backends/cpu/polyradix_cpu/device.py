"""The entry point of the CPU backend: a cheap probe, and the choice of kernels."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, cast

from polyradix.backend.protocol import Backend, Found
from polyradix_cpu.host import processor

Kernels = Literal["auto", "native", "torch"]
Attention = Literal["own", "ipex"]


class Entry:
    """See polyradix.backend.registry. POLYRADIX_CPU_KERNELS and POLYRADIX_CPU_ATTENTION override the options."""

    protocol = (1, 0)

    def probe(self) -> Found:
        name, sets = processor()
        if find_spec("torch") is None:
            return Found(False, "torch is not installed")
        return Found(True, f"{name} ({', '.join(sets) or 'generic'})", rank=10)

    def create(self, kernels: Kernels = "auto", attention: Attention = "own", threads: int | None = None) -> Backend:
        """`kernels`: our own native library, upstream torch alone, or `auto`, the first where it loads. `attention`:
        `ipex` reads the cache through Intel's archived extension, with torch kernels. `threads`: None is torch's."""
        kernels = cast(Kernels, _choice("kernels", "POLYRADIX_CPU_KERNELS", kernels, ("auto", "native", "torch")))
        attention = cast(Attention, _choice("attention", "POLYRADIX_CPU_ATTENTION", attention, ("own", "ipex")))
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        from polyradix_cpu.backend import create

        return create(kernels, attention, threads)


def _choice(option: str, variable: str, value: str, allowed: tuple[str, ...]) -> str:
    value, source = (os.environ[variable], variable) if os.environ.get(variable) else (value, option)
    if value not in allowed:
        raise ValueError(f"{source} is {value!r}; expected one of {', '.join(allowed)}")
    return value
