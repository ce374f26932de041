"""The step as one program: pure, jitted over the mesh inside one shard_map, the KV alone donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from polyradix.backend.protocol import Ops, Params, Step
from polyradix_tpu.batch import Shape, unpack
from polyradix_tpu.mesh import Packed, cache_split, partition


def jit_step(step: Step, ops: Ops, mesh: Mesh) -> Any:
    """A jitted function ((top, layers), kv, vector, shape) -> (logits f32[S,V], kv); `shape` is static. Its `lower`
    takes ShapeDtypeStructs with shardings as well, so that a mesh of devices that are not here will do."""

    @partial(jax.jit, static_argnums=3, donate_argnums=1)
    def program(params: Any, kv: Any, vector: jax.Array, shape: Shape) -> tuple[jax.Array, Any]:
        def local(params: Any, kv: Any, vector: jax.Array) -> tuple[jax.Array, Any]:
            return step(ops, Params(*params), kv, unpack(vector, shape))

        specs = jax.tree.map(partition, params, is_leaf=lambda w: isinstance(w, Packed))
        everywhere, heads = PartitionSpec(), jax.tree.map(cache_split, kv)
        whole: Any = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, heads, everywhere),
            out_specs=(everywhere, heads),
            check_vma=False,
        )
        logits, kv = whole(params, kv, vector)
        return logits, kv

    return program
