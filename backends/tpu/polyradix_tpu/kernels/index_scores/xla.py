"""The same in plain XLA: the keys of all pages are gathered."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polyradix_tpu.kernels.xla import precision


def scores(
    index: jax.Array, weights: jax.Array, cache: jax.Array, pages: jax.Array, until: jax.Array, first: int
) -> jax.Array:
    """See the package; `until` makes no difference."""
    keys = cache[pages][..., first : first + index.shape[3]].reshape(len(pages), -1, index.shape[3])
    exact = precision(cache.dtype)
    each = jnp.einsum("cqhd,ckd->cqhk", index, keys, precision=exact, preferred_element_type=jnp.float32)
    return jnp.einsum("cqh,cqhk->cqk", weights, jax.nn.relu(each), precision=jax.lax.Precision.HIGHEST)
