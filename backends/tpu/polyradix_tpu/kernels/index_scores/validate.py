"""What the kernel takes, from shapes alone; nothing here touches a device."""

from __future__ import annotations

from typing import Any

from polyradix_tpu.kernels.chip import DTYPES, LANES, SMEM, SUBLANES, Problems, lanes

VMEM = 56 << 20  # bytes that one call may use: the smallest chip has 64 MiB


def vmem(tile: int, heads: int, dim: int, context: int, keys: int, columns: int, itemsize: int) -> int:
    """Bytes: queries, results and fetched rows twice, weights along lanes, and what one block of keys makes."""
    rows, shown = tile * heads, max(tile, SUBLANES)
    moved = 2 * itemsize * (rows * lanes(dim) + keys * columns) + 8 * shown * (context + lanes(heads))
    return moved + 4 * rows * LANES + 8 * rows * keys


def problems(
    index: Any, weights: Any, cache: Any, pages: Any, until: Any, first: int, keys: int, interpret: bool = False
) -> list[str]:
    """Why the kernel does not take these: field, value, what was expected. Interpreted it is not bound to tiles."""
    out = Problems()
    expect = out.expect
    expect(index.ndim == 4, "index's shape", index.shape, "[C,tile,heads,dim]")
    expect(cache.ndim == 3, "cache's shape", cache.shape, "[pages, page, W]")
    expect(pages.ndim == 2 and pages.shape[0] == index.shape[0], "pages' shape", pages.shape, "[C,P]")
    if out:
        return out
    (tiles, tile, heads, dim), (_, page, wide) = index.shape, cache.shape
    context, itemsize = pages.shape[1] * page, cache.dtype.itemsize
    dtypes = {x.dtype.name for x in (index, cache)}
    expect(weights.shape == (tiles, tile, heads), "weights' shape", weights.shape, f"{(tiles, tile, heads)}")
    expect(until.shape == (tiles,), "until's shape", until.shape, f"{(tiles,)}")
    expect(len(dtypes) == 1 and dtypes < {*DTYPES}, "dtypes", sorted(dtypes), f"one of {DTYPES}")
    expect(0 <= first <= wide - dim, "first", first, f"at most {wide - dim}")
    expect(keys > 0 and keys % page == 0, "keys", keys, f"a multiple of the page, {page}")
    expect(keys > 0 and context % keys == 0, "keys", keys, f"a part of the context, {context}")
    if not interpret:
        sublanes = SUBLANES * 4 // itemsize
        expect(dim % LANES == 0, "dim", dim, f"a multiple of {LANES}")
        expect(wide % LANES == 0, "W", wide, f"a multiple of {LANES}")
        expect(heads % SUBLANES == 0, "heads", heads, f"a multiple of {SUBLANES}")
        expect(page % sublanes == 0, "page", page, f"a multiple of {sublanes}")
        expect(keys % LANES == 0, "keys", keys, f"a multiple of {LANES}")
    if out:
        return out
    size = vmem(tile, heads, dim, context, keys, lanes(first % LANES + dim), itemsize)
    expect(size <= VMEM, f"VMEM for {context} rows and {keys} keys", size, f"at most {VMEM}")
    table = 4 * tiles * (pages.shape[1] + 1)
    expect(table <= SMEM, "bytes of the page table", table, f"at most {SMEM}: larger pages make it shorter")
    return out
