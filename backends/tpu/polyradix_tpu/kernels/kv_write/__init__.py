"""This batch's keys and values into the paged cache, in place. See kernel, validate, reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.kv_write.kernel import call
from polyradix_tpu.kernels.kv_write.validate import problems

__all__ = ["problems", "write"]


def write(k: jax.Array, v: jax.Array, kv: jax.Array, m: JaxMeta, interpret: Any = False) -> jax.Array:
    """k and v [T,Hk,D] into their slots of kv [pages, page, 2*Hk, C], C at least D, with zeros from D on; in place
    where kv is donated. Rows of padding are not written. Raises ValueError for what `problems` names."""
    found = problems(k, kv, interpret=bool(interpret))
    if found:
        raise ValueError("; ".join(found))
    rows = jnp.stack([k, v], axis=2).reshape(len(k), kv.shape[2], -1).astype(kv.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, kv.shape[3] - rows.shape[2])))
    return call(rows, m.slots, m.cu_q[-1:], kv.reshape(-1, *kv.shape[2:]), interpret).reshape(kv.shape)
