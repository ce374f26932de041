"""Loading a kernel library, and the two structures of its interface (csrc/px.h), field for field."""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch  # loaded first, so that the library's libgomp is torch's own copy and there is one thread pool

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
NEEDS = {"amx": AVX512 | {"amx_tile", "amx_bf16"}, "avx512": AVX512, "avx2": {"avx2", "fma"}}  # best first
F32, SEQS = 1, 2
PLAIN, SPLIT_GATE, FUSED_SILU, FUSED_GELU = range(4)
SOFTMAX, RENORMALISE, BIASED_LOGITS = 1, 2, 4
SILU, GELU, CLAMPED = range(3)


class Kind(IntEnum):
    EMBED, LINEAR, ADD, NORM, ADD_NORM, ROPE, ATTEND, GATED, LAST, ARGMAX, ROUTE, EXPERTS, SUM, CAP, LATENT, HEADS = (
        range(16)
    )


class Op(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("mult", ctypes.c_int64),
        ("p", ctypes.c_void_p * 6),
        ("n", ctypes.c_int64 * 9),
        ("f", ctypes.c_float * 2),
    )


ARRAYS = ("tokens", "positions", "slots", "cu_q", "kv_len", "pages", "last")


class Header(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("T", "S", "threads", "page_stride")),
        *((name, ctypes.c_void_p) for name in ARRAYS),
    )


class Samples(ctypes.Structure):
    _fields_ = (
        ("S", ctypes.c_int64),
        ("V", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "temperature", "top_p", "min_p")),
        *((name, ctypes.c_void_p) for name in ("top_k", "seed", "position", "mask", "out")),
    )


@dataclass(frozen=True)
class Library:
    """A loaded library: `run(ops, count, header)` and `sample(samples, threads)`, both without the GIL."""

    isa: str
    run: Any
    sample: Any


def cpu_flags() -> set[str]:
    """The processor's feature names as Linux spells them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((x for x in text.splitlines() if x.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def find_isa() -> str | None:
    """The instruction set to use: POLYRADIX_CPU_ISA, or the best that this processor has and a library was built for.

    None when there is none or the variable says `none`. Raises ValueError when the variable names an unknown set or one
    that cannot run here."""
    asked = os.environ.get("POLYRADIX_CPU_ISA", "")
    if asked == "none":
        return None
    if asked and asked not in NEEDS:
        raise ValueError(f"POLYRADIX_CPU_ISA is {asked!r}; expected one of {', '.join(NEEDS)} or none")
    flags = cpu_flags()
    usable = [isa for isa, needs in NEEDS.items() if needs <= flags and _path(isa).exists() and _open(isa)]
    if asked and asked not in usable:
        raise ValueError(f"POLYRADIX_CPU_ISA is {asked!r}; this machine can use {', '.join(usable) or 'none'}")
    return asked or next(iter(usable), None)


def load(isa: str | None = None) -> Library | None:
    """The library of `isa` (default: what find_isa says), or None when there is none to use."""
    isa = isa or find_isa()
    return _open(isa) if isa else None


def _path(isa: str) -> Path:
    return Path(__file__).with_name(f"px_{isa}.so")


def check_sources(folder: Path = Path(__file__).parent, sources: Path = Path(__file__).parents[2] / "csrc") -> None:
    """Raises RuntimeError where sources lie beside the package and the libraries in `folder` were built from others, as
    those would crash."""
    if not sources.is_dir():
        return
    built = folder / "px.sha256"
    found = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]*")))).hexdigest()
    if not built.exists() or built.read_text() != found:
        raise RuntimeError(f"the native kernels in {folder} are older than {sources}: pip install -e {sources.parent}")


@cache
def _open(isa: str) -> Library | None:
    check_sources()
    torch.get_num_threads()
    dll = ctypes.CDLL(str(_path(isa)))
    if not dll.px_init():
        return None
    dll.px_run.restype = None
    dll.px_run.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    dll.px_sample.restype = None
    dll.px_sample.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    return Library(isa, dll.px_run, dll.px_sample)
