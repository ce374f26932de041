"""What the kernel takes, and the sizes it is compiled with; nothing here touches a device."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from polyradix.backend.protocol import AttnSpec
from polyradix_tpu.batch import Shape
from polyradix_tpu.kernels.chip import DTYPES, LANES, SMEM, SUBLANES, Problems, tuned
from polyradix_tpu.kernels.ragged_paged_attention.sizes import Sizes

BLOCKS = Path(__file__).with_name("blocks.json")
VMEM = 48 << 20  # bytes that one call may use; the smallest chip has 64 MiB
COLUMNS = 2048  # of a flat block's scores at most


def plan(kv: Any, shape: Shape, a: AttnSpec, tile: int) -> tuple[Sizes, int]:
    """Sizes for a cache [pages, page, 2*Hk, D] on the chip that is compiled for, and the VMEM they take in bytes."""
    chosen = tuned(BLOCKS)["flat" if tile == 1 else "split"]
    page, rows, dim = kv.shape[1:]
    token = rows * dim * kv.dtype.itemsize
    most = min(chosen["block_bytes"] // token, COLUMNS // (rows // 2) if tile == 1 else COLUMNS)
    least = LANES if tile > 1 else LANES // gcd(rows // 2, LANES)
    tokens = max(least, page, 1 << most.bit_length() - 1)
    count = shape.seqs if tile == 1 else shape.tiles
    cores = gcd(chosen["cores"], count)
    items = gcd(chosen["items"], count // cores)
    z = Sizes(
        tile,
        rows // 2,
        4 // kv.dtype.itemsize,
        page,
        tokens // page,
        chosen["buffers"],
        items,
        cores,
        a.scale,
        a.window,
        a.softcap,
    )
    return z, vmem(z, a, dim, kv.dtype)


def vmem(z: Sizes, a: AttnSpec, dim: int, dtype: Any) -> int:
    """Bytes, with what the compiler needs for scores of one block."""
    parts, rows = (1, a.heads.q) if z.tile == 1 else (a.heads.kv, a.heads.q // a.heads.kv * z.tile)
    rows = -(-rows // 16) * 16
    block = z.tokens * z.rows * dim * dtype.itemsize
    queries = 4 * z.items * parts * rows * dim * dtype.itemsize
    state = 4 * parts * rows * (3 * LANES + dim)
    scores = 4 * 4 * rows * z.columns
    total: int = (z.buffers + 3) * block + queries + state + scores + 4 * rows * z.chunk + (2 << 20)
    return total


def problems(q: Any, kv: Any, shape: Shape, a: AttnSpec, interpret: bool = False) -> list[str]:
    """Why the kernel does not take q [T,Hq,D] and kv [pages, page, 2*Hk, C]: field, value, what was expected. What is
    expected of tiles does not hold for an interpreter, whose memory has none."""
    heads, (_, page, rows, dim) = a.heads, kv.shape
    out = Problems()
    expect = out.expect
    expect(q.shape[1:] == (heads.q, heads.dim), "q's shape", q.shape, f"(T, {heads.q}, {heads.dim})")
    expect(rows == 2 * heads.kv, "rows of a slot", rows, f"2 * {heads.kv}")
    expect(heads.kv > 0 and heads.q % heads.kv == 0, "query heads", heads.q, f"a multiple of {heads.kv}")
    expect(q.dtype == kv.dtype and kv.dtype.name in DTYPES, "dtypes", (q.dtype.name, kv.dtype.name), f"one of {DTYPES}")
    fits = heads.dim <= dim and (dim <= LANES or dim == 2 * LANES)
    expect(fits, "head_dim in the cache", dim, f"{heads.dim} to {LANES}, or {2 * LANES}")
    expect(page in (8, 16, 32, 64, 128), "page", page, "8, 16, 32, 64 or 128")
    if out:
        return out
    if not interpret:
        tiled = rows % SUBLANES == 0 or (dim == LANES and rows in (2, 4))
        expect(dim % LANES == 0, "head_dim in the cache", dim, f"a multiple of {LANES}")
        expect(tiled, "rows of a slot", rows, f"a multiple of {SUBLANES}, or 2 or 4 with head_dim {LANES}")
    scalars = 4 * (shape.seqs * shape.pages + 6 * max(shape.seqs, shape.tiles))
    expect(scalars <= SMEM, "bytes of page table and items", scalars, f"at most {SMEM}; larger pages make it smaller")
    for tile in {1, shape.tile}:
        size = plan(kv, shape, a, tile)[1]
        expect(size <= VMEM, f"VMEM for tiles of {tile}", size, f"at most {VMEM}")
    return out
