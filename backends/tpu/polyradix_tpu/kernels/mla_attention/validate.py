"""What the kernel takes, checked from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from polyradix_tpu.batch import Shape
from polyradix_tpu.kernels.chip import Chip

LANES, SUBLANES = 128, 8
SPARE = 4 << 20  # bytes of vector memory for what the compiler spills


@dataclass(frozen=True)
class Blocks:
    """Keys fetched at once, and query tokens of a tile that meet them at once."""

    keys: int
    queries: int


def width(latent: int, rope: int) -> int:
    """Of a row of the cache: whole lane tiles."""
    return -(-(latent + rope) // LANES) * LANES


def vmem(heads: int, latent: int, wide: int, tile: int, blocks: Blocks, itemsize: int) -> int:
    """Bytes: queries, results and keys twice, the sums in float32, and what one group of queries computes."""
    rows, some = tile * heads, blocks.queries * heads
    ends = 2 * itemsize * (rows * (wide + latent) + blocks.keys * wide)
    sums = 4 * rows * (latent + 3 * LANES)
    return ends + sums + some * (blocks.keys * (4 + itemsize) + 4 * latent)


def check(q_latent: Any, q_rope: Any, cache: Any, shape: Shape, blocks: Blocks, chip: Chip) -> None:
    """Raises ValueError, which names the field, its value and what was expected."""

    def need(ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            raise ValueError(f"mla_attention: {field} is {value}; expected {expected}")

    dtype, itemsize = cache.dtype, cache.dtype.itemsize
    need(q_latent.ndim == 3, "q_latent.shape", q_latent.shape, "[T,H,R]")
    tokens, heads, latent = q_latent.shape
    need(tokens == shape.tokens, "q_latent.shape[0]", tokens, f"{shape.tokens}, the batch's tokens")
    need(q_rope.ndim == 3 and q_rope.shape[:2] == (tokens, heads), "q_rope.shape", q_rope.shape, "[T,H,Dr]")
    need(cache.ndim == 3, "cache.shape", cache.shape, "[pages, page, R + Dr in whole lane tiles]")
    page, wide = cache.shape[1:]
    need(wide == width(latent, q_rope.shape[2]), "cache.shape[2]", wide, str(width(latent, q_rope.shape[2])))
    need(latent % LANES == 0, "R", latent, f"a multiple of {LANES}")
    need(heads % SUBLANES == 0, "H", heads, f"a multiple of {SUBLANES}")
    need(dtype in (jnp.bfloat16, jnp.float32), "cache.dtype", dtype, "bfloat16 or float32")
    need(q_latent.dtype == dtype, "q_latent.dtype", q_latent.dtype, f"{dtype}, as the cache has")
    need(q_rope.dtype == dtype, "q_rope.dtype", q_rope.dtype, f"{dtype}, as the cache has")
    packed = SUBLANES * 4 // itemsize
    need(page % packed == 0, "page", page, f"a multiple of {packed} for {dtype}")
    need(blocks.keys > 0 and blocks.keys % page == 0, "blocks.keys", blocks.keys, f"a multiple of the page, {page}")
    need(
        blocks.queries > 0 and shape.tile % blocks.queries == 0,
        "blocks.queries",
        blocks.queries,
        f"a divisor of the tile, {shape.tile}",
    )
    used, most = vmem(heads, latent, wide, shape.tile, blocks, itemsize), chip.vmem - SPARE
    need(used <= most, "VMEM of the blocks", used, f"at most {most} bytes on {chip.name}")
    plan = 4 * (shape.seqs * shape.pages + 4 * shape.tiles)
    need(plan <= chip.smem // 2, "SMEM of pages and tiles", plan, f"at most {chip.smem // 2} bytes: larger pages help")
