"""What the kernel takes; nothing here touches a device."""

from __future__ import annotations

from typing import Any

LANES, SUBLANES = 128, 8
SMEM = 1 << 19  # bytes of slots: chips have 1 MiB
DTYPES = ("bfloat16", "float32")


def problems(k: Any, kv: Any, interpret: bool = False) -> list[str]:
    """Why the kernel does not take k [T,Hk,D] and kv [pages, page, 2*Hk, C]: field, value, what was expected."""
    out = []

    def expect(ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            out.append(f"{field} is {value}; expected {expected}")

    rows, dim = kv.shape[2:]
    tiled = rows % SUBLANES == 0 or rows in (2, 4)
    expect(kv.dtype.name in DTYPES, "the cache's dtype", kv.dtype.name, f"one of {DTYPES}")
    expect(rows == 2 * k.shape[1], "rows of a slot", rows, f"2 * {k.shape[1]}")
    expect(k.shape[2] <= dim, "head_dim in the cache", dim, f"at least {k.shape[2]}")
    expect(bool(interpret) or dim % LANES == 0, "head_dim in the cache", dim, f"a multiple of {LANES}")
    expect(bool(interpret) or tiled, "rows of a slot", rows, f"2, 4 or a multiple of {SUBLANES}")
    expect(4 * k.shape[0] <= SMEM, "bytes of slots", 4 * k.shape[0], f"at most {SMEM}")
    return out
