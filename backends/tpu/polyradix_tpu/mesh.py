"""The mesh: how parameters are placed on it, and what its ranks tell each other inside a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyradix.backend.protocol import HOST_DTYPES, KV_DTYPES, HostArray, KVSpec, ParamSpec
from polyradix.backend.shard import shard

AXIS = "tp"
LANES = 128  # a TPU stores the last axis in multiples of this
HEADS = PartitionSpec(None, None, AXIS)  # of a layer's cache [pages, page, 2*Hk, D]


@partial(jax.tree_util.register_dataclass, data_fields=["value", "bias"], meta_fields=["rows", "axis"])
@dataclass(frozen=True)
class Packed:
    """One parameter, or in a step one rank's shard of it, in the spec's dtype. A pytree whose leaves are the arrays."""

    value: Any
    bias: Any
    rows: int  # of the whole, without padding
    axis: int | None  # split over ranks


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["places"])
@dataclass(frozen=True)
class Grouped:
    """A cache in groups inside a step: `places` has the group and the array of each layer."""

    arrays: list[Any]
    places: tuple[tuple[int, int], ...]


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["group"])
@dataclass(frozen=True)
class LayerKV:
    """Of one layer of such a cache."""

    array: Any
    group: int


def place(mesh: Mesh, spec: ParamSpec, value: HostArray, bias: HostArray | None) -> Packed:
    """Each rank's shard on its device."""

    def put(whole: HostArray, part: Literal["weight", "bias"], split: PartitionSpec) -> jax.Array:
        devices = mesh.devices.flat
        each = [jax.device_put(shard(spec, whole, r, mesh.size, part), d) for r, d in enumerate(devices)]
        axis = next((i for i, name in enumerate(split) if name), None)
        shape = tuple(n * (mesh.size if i == axis else 1) for i, n in enumerate(each[0].shape))
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, split), each)

    specs = partition(Packed(value, bias, spec.shape[0], spec.shard_axis))
    value = put(value, "weight", specs.value)
    return Packed(value, None if bias is None else put(bias, "bias", specs.bias), spec.shape[0], spec.shard_axis)


def abstract(mesh: Mesh, spec: ParamSpec) -> Packed:
    """What `place` gives, without values: the mesh's devices need not be here."""

    def struct(shape: tuple[int, ...], split: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, HOST_DTYPES[spec.dtype], sharding=NamedSharding(mesh, split))

    split = spec.kind == "logits" and spec.shard_axis is not None
    rows = spec.shape[0] + (-spec.shape[0] % mesh.size if split else 0)
    specs = partition(Packed(None, spec.bias or None, spec.shape[0], spec.shard_axis))
    bias = struct((rows, *spec.shape[1:-1]), specs.bias) if spec.bias else None
    return Packed(struct((rows, *spec.shape[1:]), specs.value), bias, spec.shape[0], spec.shard_axis)


def cache_shape(spec: KVSpec, pages: int, lanes: int) -> tuple[int, ...]:
    """Of an array: [pages, page, 2*Hk, C], where C is the head size rounded up to `lanes`; of a latent one, [pages,
    page, W], where W is the row rounded up to LANES anywhere."""
    if spec.kind == "latent":
        return pages, spec.page_size, -(-spec.head_dim // LANES) * LANES
    return pages, spec.page_size, 2 * spec.kv_heads, -(-spec.head_dim // lanes) * lanes


def kv_page_bytes(spec: KVSpec, tp: int, lanes: int) -> int:
    """Bytes of one page on one device, all arrays."""
    whole = spec.depth * prod(cache_shape(spec, 1, lanes)) * KV_DTYPES[spec.dtype].itemsize
    return int(whole if spec.kind == "latent" else whole // tp)


def cache_split(layer: Any) -> PartitionSpec:
    """Of a layer's cache: by heads, or whole on every rank if it is latent."""
    return HEADS if layer.ndim == 4 else PartitionSpec()


def partition(w: Packed) -> Packed:
    """The same tree with a PartitionSpec for each array."""
    value = PartitionSpec() if w.axis is None else PartitionSpec(*[None] * w.axis, AXIS)
    bias = None if w.bias is None else PartitionSpec(AXIS) if w.axis == 0 else PartitionSpec()
    return Packed(value, bias, w.rows, w.axis)


class MeshCollectives:
    """Collectives over the axis of a shard_map. Sums are taken in float32 at least and rounded once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(_wide(x), AXIS).astype(x.dtype)

    def all_gather(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)

    def reduce_scatter(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.psum_scatter(_wide(x), AXIS, scatter_dimension=axis, tiled=True).astype(x.dtype)

    def all_to_all(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.all_to_all(x, AXIS, split_axis=axis, concat_axis=axis, tiled=True)

    def broadcast(self, x: jax.Array, root: int) -> jax.Array:
        return jax.lax.all_gather(x, AXIS)[root]

    def permute(self, x: jax.Array, to: Sequence[int]) -> jax.Array:
        if sorted(to) != list(range(self.size)):
            raise ValueError(f"permute to {list(to)}; expected each rank from 0 to {self.size - 1} once")
        return jax.lax.ppermute(x, AXIS, list(enumerate(to)))

    def barrier(self) -> None: ...


def make_mesh(devices: Sequence[Any], tp: int) -> Mesh:
    return Mesh(np.array(devices[:tp]), (AXIS,))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
