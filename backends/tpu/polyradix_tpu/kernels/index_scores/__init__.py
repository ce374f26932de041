"""The scores of an indexer over the paged cache, see IndexSpec in the contract, for tiles of neighbouring queries.

    out[c,q,s] = sum over h of weights[c,q,h] * max(0, index[c,q,h] . key[s])     for rows s < until[c] of c's pages

index [C,tile,heads,dim] in the dtype of the cache, weights [C,tile,heads] float32, cache [pages, page, W] with the key
of a row in its columns from `first` on, pages i32 [C,P], until i32 [C] at least 1: -> float32 [C,tile,P*page], which
holds anything from `until` on, NaN as well. No product of heads and keys is ever in memory, and of the cache only the
lanes with keys are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp

from polyradix_tpu.batch import TILE
from polyradix_tpu.kernels.index_scores import kernel, xla
from polyradix_tpu.kernels.index_scores.validate import problems

__all__ = ["choose", "problems", "samples", "scores", "scores_xla"]

KEYS = {1: 2048, TILE: 1024}  # fetched at once, by the rows of a tile

scores_xla = xla.scores


def scores(
    index: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    pages: jax.Array,
    until: jax.Array,
    first: int,
    *,
    keys: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The Pallas kernel. `keys`: how many are fetched at once, None takes `choose`. `interpret`: as pallas_call's.
    Raises ValueError for what the kernel does not take, at trace time."""
    keys = keys or choose(index, cache, pages)
    found = problems(index, weights, cache, pages, until, first, keys, bool(interpret))
    if found:
        raise ValueError("; ".join(found))
    return kernel.call(index, weights, cache, pages, until, first, keys, interpret)


def choose(index: Any, cache: Any, pages: Any) -> int:
    """Keys fetched at once: a part of the context that suits the tile."""
    return gcd(pages.shape[1] * cache.shape[1], KEYS.get(index.shape[1], KEYS[TILE]))


def samples() -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """(label, function, arguments without values, numbers of the donated ones): DeepSeek-V3.2, contexts of up to 8,192
    and 65,536 tokens, 3 GiB of cache."""
    heads, dim, page, bf16, i32 = 64, 128, 64, jnp.bfloat16, jnp.int32
    cache = jax.ShapeDtypeStruct((32768, page, 768), bf16)
    for label, tiles, tile in (("decode", 64, 1), ("prefill", 32, TILE)):
        for context in (8192, 65536):
            args = (
                jax.ShapeDtypeStruct((tiles, tile, heads, dim), bf16),
                jax.ShapeDtypeStruct((tiles, tile, heads), jnp.float32),
                cache,
                jax.ShapeDtypeStruct((tiles, context // page), i32),
                jax.ShapeDtypeStruct((tiles,), i32),
            )
            yield f"{label}, {context}", partial(scores, first=576), args, ()
