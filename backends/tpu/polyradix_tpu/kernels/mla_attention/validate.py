"""What the kernel takes, from shapes alone; nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyradix_tpu.batch import Shape
from polyradix_tpu.kernels.chip import DTYPES, LANES, SMEM, SUBLANES, Problems, lanes

VMEM = 56 << 20  # bytes that one call may use: the smallest chip has 64 MiB


@dataclass(frozen=True)
class Blocks:
    """Keys fetched at once, neighbouring queries of one sequence that meet them at once, and the TensorCores of a JAX
    device, which share the units."""

    keys: int
    queries: int
    cores: int = 1


def units(shape: Shape, queries: int) -> int:
    """Groups of `queries` rows of one sequence: enough however the tokens are spread over the sequences."""
    return shape.tokens // queries + (shape.seqs if queries > 1 else 0)


def vmem(heads: int, latent: int, rope: int, blocks: Blocks, itemsize: int) -> int:
    """Bytes: queries and keys twice, results, sums in float32, and what one block of keys makes of the queries."""
    rows, wide = blocks.queries * heads, lanes(latent + rope)
    moved = itemsize * (2 * rows * (latent + lanes(rope)) + 3 * blocks.keys * wide + rows * latent) + 4 * rows * LANES
    return moved + 4 * rows * (2 * latent + 2 * LANES) + rows * blocks.keys * (8 + itemsize)


def problems(q_latent: Any, q_rope: Any, cache: Any, shape: Shape, blocks: Blocks) -> list[str]:
    """Why the kernel does not take these: field, value, what was expected."""
    out = Problems()
    expect = out.expect
    expect(q_latent.ndim == 3 and q_latent.shape[0] == shape.tokens, "q_latent's shape", q_latent.shape, "[T,H,R]")
    expect(cache.ndim == 3, "cache's shape", cache.shape, "[pages, page, W]")
    if out:
        return out
    (_, heads, latent), (_, page, wide) = q_latent.shape, cache.shape
    expect(q_rope.ndim == 3 and q_rope.shape[:2] == q_latent.shape[:2], "q_rope's shape", q_rope.shape, "[T,H,Dr]")
    rope, itemsize = q_rope.shape[-1], cache.dtype.itemsize
    sublanes = SUBLANES * 4 // itemsize
    dtypes = {x.dtype.name for x in (q_latent, q_rope, cache)}
    expect(len(dtypes) == 1 and dtypes < {*DTYPES}, "dtypes", sorted(dtypes), f"one of {DTYPES}")
    whole = wide % LANES == 0 and wide >= latent + rope
    expect(whole, "W", wide, f"whole tiles of {LANES} for R + Dr = {latent + rope}")
    expect(latent % LANES == 0, "R", latent, f"a multiple of {LANES}")
    expect(heads % sublanes == 0, "heads", heads, f"a multiple of {sublanes}")
    expect(page % sublanes == 0, "page", page, f"a multiple of {sublanes}")
    expect(blocks.keys > 0 and blocks.keys % page == 0, "keys", blocks.keys, f"a multiple of the page, {page}")
    expect(blocks.queries > 0, "queries", blocks.queries, "at least 1")
    expect(blocks.cores > 0, "cores", blocks.cores, "at least 1")
    if out:
        return out
    size = vmem(heads, latent, rope, blocks, itemsize)
    plan = 4 * (shape.seqs * shape.pages + 5 * units(shape, blocks.queries))
    expect(size <= VMEM, f"VMEM for {blocks}", size, f"at most {VMEM}")
    expect(plan <= SMEM, "bytes of the plan", plan, f"at most {SMEM}: larger pages make it shorter")
    return out
