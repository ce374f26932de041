"""The definition of a cache write in NumPy, row by row."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from polyradix.backend.batch import HostBatch


def write(k: NDArray[Any], v: NDArray[Any], kv: NDArray[Any], b: HostBatch) -> NDArray[Any]:
    """k and v [T,Hk,D] into their slots of a copy of kv [pages, page, 2*Hk, C], C >= D, with zeros from D on."""
    out = kv.copy()
    for t in range(b.num_tokens):
        slot = out[b.slots[t] // kv.shape[1], b.slots[t] % kv.shape[1]]
        slot[:] = 0
        slot[0::2, : k.shape[2]] = k[t]
        slot[1::2, : k.shape[2]] = v[t]
    return out
