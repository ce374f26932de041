"""Attention over the latent cache of MLA, in its absorbed form: every head reads the same row of each token.

    out[t,h] = softmax(scale * (q_latent[t,h] . c + q_rope[t,h] . k)) c    over the rows (c, k) up to t's position

q_latent [T,H,R], q_rope [T,H,Dr], both in the cache's dtype; cache [pages, page, W] with this batch's rows already in
it, W whole tiles of 128: c, then k (already rotated), then what is not read. Decode and prefill rows may be mixed. The
result is [T,H,R] in that dtype and, if `lse`, the natural log of the sum of exponentials, f32[T,H]; else None. bfloat16
or float32; sums in float32. Padded rows of the result hold anything, NaN as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from polyradix_tpu.batch import TILE, JaxMeta, Shape, unpack
from polyradix_tpu.kernels.chip import lanes, tuned
from polyradix_tpu.kernels.mla_attention import kernel, xla
from polyradix_tpu.kernels.mla_attention.validate import Blocks, problems

BLOCKS = Path(__file__).with_name("blocks.json")


def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    cache: jax.Array,
    m: JaxMeta,
    scale: float,
    *,
    lse: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The Pallas kernel. `blocks`: None takes those of blocks.json for the chip in context. `interpret`: as
    pallas_call's. Raises ValueError for what the kernel does not take, at trace time."""
    blocks = blocks or choose(q_latent.shape[1], cache.shape[1], m.shape)
    found = problems(q_latent, q_rope, cache, m.shape, blocks)
    if found:
        raise ValueError("; ".join(found))
    return kernel.call(q_latent, q_rope, cache, m, scale, blocks, lse, interpret)


def mla_attention_xla(
    q_latent: jax.Array, q_rope: jax.Array, cache: jax.Array, m: JaxMeta, scale: float, *, lse: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """The same in plain XLA, for any device."""
    q = jnp.concatenate([q_latent, q_rope], axis=2)
    out, logs = xla.attend(q, q_latent.shape[2], cache, m, scale)
    return out, logs if lse else None


def choose(heads: int, page: int, shape: Shape) -> Blocks:
    """Whole pages; and one query in a decode, else as many as suit the chip."""
    table, decode = tuned(BLOCKS), shape.tile == 1
    keys = table["decode" if decode else "prefill"]["keys"] // page
    return Blocks(max(1, keys) * page, 1 if decode else max(1, table["prefill"]["rows"] // heads), table["cores"])


def samples() -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """(label, function, arguments without values, numbers of the donated ones): DeepSeek-V3 with all its heads on a
    chip (attention is data-parallel) and over 8 chips; contexts of up to 8,192 tokens, 2.5 GiB of cache."""
    latent, rope, page, bf16 = 512, 64, 64, jnp.bfloat16
    cache = jax.ShapeDtypeStruct((32768, page, lanes(latent + rope)), bf16)
    for heads in (128, 16):
        for label, tokens, tile in (("decode", 64, 1), ("prefill", 2048, TILE)):
            shape = Shape(tokens, 64, 8192 // page, tile)
            args = (
                jax.ShapeDtypeStruct((tokens, heads, latent), bf16),
                jax.ShapeDtypeStruct((tokens, heads, rope), bf16),
                cache,
                jax.ShapeDtypeStruct((shape.length,), jnp.int32),
            )
            yield f"{heads} heads, {label}", partial(_from_vector, shape), args, ()


def _from_vector(
    shape: Shape, q_latent: jax.Array, q_rope: jax.Array, cache: jax.Array, vector: jax.Array
) -> jax.Array:
    return mla_attention(q_latent, q_rope, cache, unpack(vector, shape), 192**-0.5)[0]
