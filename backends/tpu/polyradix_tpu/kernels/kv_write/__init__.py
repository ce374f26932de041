"""This batch's keys and values into the paged cache, in place. See kernel, validate, reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from polyradix_tpu.batch import JaxMeta, Shape, unpack
from polyradix_tpu.kernels.kv_write.kernel import call
from polyradix_tpu.kernels.kv_write.validate import problems

__all__ = ["problems", "samples", "write"]


def write(k: jax.Array, v: jax.Array, kv: jax.Array, m: JaxMeta, interpret: Any = False) -> jax.Array:
    """k and v [T,Hk,D] into their slots of kv [pages, page, 2*Hk, C], C at least D, with zeros from D on; in place
    where kv is donated. Rows of padding are not written. Raises ValueError for what `problems` names."""
    found = problems(k, kv, interpret=bool(interpret))
    if found:
        raise ValueError("; ".join(found))
    rows = jnp.stack([k, v], axis=2).reshape(len(k), kv.shape[2], -1).astype(kv.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, kv.shape[3] - rows.shape[2])))
    return call(rows, m.slots, m.cu_q[-1:], kv.reshape(-1, *kv.shape[2:]), interpret).reshape(kv.shape)


def samples() -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """(label, function, arguments without values, numbers of the donated ones) at serving shapes of one chip, into a
    GiB of cache."""
    for label, heads, dim in (("Llama-3.1-8B tp=4", 2, 128), ("Llama-3.1-8B tp=1", 8, 128), ("gemma-2-2b", 4, 256)):
        for step, shape in ("decode", Shape(64, 64, 256, 1)), ("mixed", Shape(1024, 64, 256, 16)):
            pages = (1 << 30) // (16 * 2 * heads * dim * 2)
            rows = jax.ShapeDtypeStruct((shape.tokens, heads, dim), jnp.bfloat16)
            cache = jax.ShapeDtypeStruct((pages, 16, 2 * heads, dim), jnp.bfloat16)
            vector = jax.ShapeDtypeStruct((shape.length,), jnp.int32)
            yield f"{label} {step}", partial(_sample, shape), (rows, rows, cache, vector), (2,)


def _sample(shape: Shape, k: jax.Array, v: jax.Array, kv: jax.Array, vector: jax.Array) -> jax.Array:
    return write(k, v, kv, unpack(vector, shape))
