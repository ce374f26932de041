"""The host side of the TPU backend: everything is launched at once, and nothing waits but the futures of `fetch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polyradix.backend.alone import Alone
from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, KV_GROUPS, Capabilities, Unsupported, check_claimed
from polyradix.backend.protocol import (
    HOST_DTYPES,
    KV,
    KV_DTYPES,
    Array,
    Collectives,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    LogProbs,
    Memory,
    Meta,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix.backend.quant import check_quant
from polyradix.backend.shard import check_kv, check_param
from polyradix_tpu import sampling
from polyradix_tpu.batch import Ladder, Shape, pack
from polyradix_tpu.device import host_memory
from polyradix_tpu.kernels import choose
from polyradix_tpu.mesh import (
    AXIS,
    LANES,
    Grouped,
    MeshCollectives,
    cache_shape,
    cache_split,
    kv_page_bytes,
    make_mesh,
    place,
)
from polyradix_tpu.ops import JaxOps
from polyradix_tpu.program import jit_step


@dataclass(frozen=True)
class Rows:
    """An array on the device whose rows from `count` on are padding: what the core holds as an Array."""

    array: jax.Array
    count: int


@dataclass(frozen=True)
class Prepared:
    """A batch on its way to the device."""

    vector: jax.Array
    shape: Shape
    sizes: tuple[int, int, int]  # of the HostBatch


@dataclass(frozen=True)
class Cache:
    """What the core holds as a KV: `spec.depth` arrays, see mesh.cache_shape, split over the mesh by heads or not at
    all. What is beyond the head size stays zero."""

    arrays: list[jax.Array]
    spec: KVSpec

    @property
    def inside(self) -> Any:
        """As a step takes it."""
        return Grouped(self.arrays, tuple(self.spec.places)) if self.spec.groups else self.arrays


class TPUBackend:
    ops: Ops
    collectives: Collectives

    def __init__(self, devices: Sequence[Any], tp: int, growth: int | None, warm: bool, kernels: str) -> None:
        self._mesh = make_mesh(devices, tp)
        self.collectives = Alone() if tp == 1 else MeshCollectives(tp)
        self._device = devices[0]
        self._real = self._device.platform == "tpu"
        self._lanes = LANES if self._real else 1
        chosen = choose(kernels, self._real)
        self.ops = JaxOps(self.collectives, chosen)
        self._warm = warm
        self._ladder = Ladder(growth or (2 if self._real else 4), chosen.tile)
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._fetcher = ThreadPoolExecutor(2, "polyradix-fetch")
        self.caps = Capabilities(
            name="tpu",
            device=f"{self._device.device_kind} ({self._device.platform}), JAX {jax.__version__}",
            dtypes=frozenset(HOST_DTYPES),
            page_sizes=(16, 32, 64, 128, 8),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES | {KV_GROUPS, "kv_fp8"},
            async_launch=True,
            max_tp=len(devices),
            emulated=not self._real,
            notes=(
                f"kernels: {chosen.name}",
                "a prefix hit is not bit-exact with a miss: products sum as their sizes suit XLA",
            ),
        )

    def memory(self) -> Memory:
        stats = [d.memory_stats() for d in self._mesh.devices.flat]
        if all(s and "bytes_limit" in s for s in stats):
            return min((Memory(s["bytes_limit"] - s["bytes_in_use"], s["bytes_limit"]) for s in stats), key=_free)
        whole = host_memory()
        return Memory(whole.free // len(stats), whole.total // len(stats))

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        dtype = _dtype(spec.dtype, f"parameter {spec.name}")
        check_param(spec, self._mesh.size)
        check_quant(spec, self.caps)
        value, bias = read(), read("bias") if spec.bias else None
        if value.shape != spec.shape:
            raise ValueError(f"parameter {spec.name} has shape {value.shape}; expected {spec.shape}")
        if spec.kind == "logits" and self._device.platform == "cpu":
            dtype = HOST_DTYPES["float32"]  # XLA's bfloat16 product on CPUs sums too loosely for float32 logits
        return place(self._mesh, spec, value.astype(dtype), None if bias is None else bias.astype(dtype))

    def kv_page_bytes(self, spec: KVSpec) -> int:
        check_kv(spec, self._mesh.size)
        _dtype(spec.dtype, "KV", KV_DTYPES)
        return kv_page_bytes(spec, self._mesh.size, self._lanes)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        check_claimed(spec, self.caps)
        check_kv(spec, self._mesh.size)
        layer = jax.ShapeDtypeStruct(cache_shape(spec, pages, self._lanes), KV_DTYPES[spec.dtype])
        where = NamedSharding(self._mesh, cache_split(layer))
        return Cache([jnp.zeros(layer.shape, layer.dtype, device=where) for _ in range(spec.depth)], spec)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta:
        batch.check_prev(prev)
        shape = self._ladder.shape(batch)
        vector = jax.device_put(pack(batch, shape), self._everywhere)
        if prev is not None:
            vector = _link(vector, prev.array, shape.tokens)
        return Prepared(vector, shape, batch.sizes)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        program = jit_step(step, self.ops, self._mesh)
        cold = self._warm

        def run(params: Params, kv: Cache, meta: Prepared) -> tuple[Array, KV]:
            nonlocal cold
            limits.check(meta.sizes)
            tree = (params.top, params.layers)
            if cold:
                self._compile_all(program, tree, kv, limits)
                cold = False
            logits, held = program(tree, kv.inside, meta.vector, meta.shape)
            return Rows(logits, meta.sizes[1]), Cache(jax.tree.leaves(held), kv.spec)

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return Rows(sampling.sample(logits.array, batch), logits.count)

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        parts = sampling.logprobs(logits.array, tokens.array, top)
        return LogProbs(*(Rows(x, logits.count) for x in parts))

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return Cache(_copy(kv.arrays, self._page_ids(src), self._page_ids(dst)), kv.spec)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        held = _export(kv.arrays, self._page_ids(pages), kv.spec.head_dim)
        return self._fetch(held, lambda x: np.moveaxis(x[:, : len(pages)], 4, 0))

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        first, depth, dim = kv.arrays[0], len(kv.arrays), kv.spec.head_dim
        page, width, parts = first.shape[1], first.shape[-1], first.ndim - 2
        heads = first.shape[2] // 2 if parts == 2 else 1
        expected = (parts, depth, len(pages), page, heads, dim)
        if data.shape != expected:
            raise ValueError(f"imported pages have shape {data.shape}; expected {expected}")
        ids = self._page_ids(pages)
        padded = np.zeros((depth, len(ids), page, heads, parts, width), first.dtype)
        padded[:, : len(pages), ..., :dim] = np.moveaxis(data, 0, 4)
        where = NamedSharding(self._mesh, PartitionSpec(None, None, None, AXIS if parts == 2 else None))
        return Cache(_import(kv.arrays, ids, jax.device_put(padded, where)), kv.spec)

    def fetch(self, x: Array) -> Future[HostArray]:
        return self._fetch(x.array, lambda host: host[: x.count])

    def _fetch(self, x: jax.Array, cut: Callable[[HostArray], HostArray]) -> Future[HostArray]:
        x.copy_to_host_async()
        return self._fetcher.submit(lambda: np.array(cut(np.asarray(x))))  # the caller's own, to write to

    def _page_ids(self, pages: Sequence[int]) -> HostArray:
        """Padded with the scratch page."""
        out = np.zeros(self._ladder.up(len(pages)), np.int32)
        out[: len(pages)] = pages
        return out

    def _compile_all(self, program: Any, params: Any, kv: Cache, limits: Limits) -> None:
        for shape in self._ladder.all_shapes(limits, kv.spec.page_size, max(1, len(kv.spec.groups))):
            vector = jax.ShapeDtypeStruct((shape.length,), jnp.int32, sharding=self._everywhere)
            program.lower(params, kv.inside, vector, shape).compile()


def _free(m: Memory) -> int:
    return m.free


def _dtype(name: str, what: str, known: dict[str, np.dtype[Any]] = HOST_DTYPES) -> np.dtype[Any]:
    if name not in known:
        raise Unsupported(name, f"{what}; expected one of {sorted(known)}")
    return known[name]


@partial(jax.jit, static_argnums=2)
def _link(vector: jax.Array, prev: jax.Array, tokens: int) -> jax.Array:
    """Puts the previous samples into the batch's tokens."""
    held, source = vector[:tokens], vector[tokens : 2 * tokens]
    return vector.at[:tokens].set(jnp.where(source >= 0, prev[jnp.maximum(source, 0)], held))


@partial(jax.jit, donate_argnums=0)
def _copy(kv: list[jax.Array], src: jax.Array, dst: jax.Array) -> list[jax.Array]:
    return [x.at[dst].set(x[src]) for x in kv]


@partial(jax.jit, static_argnums=2)
def _export(kv: list[jax.Array], pages: jax.Array, dim: int) -> jax.Array:
    """[array, page, slot, head, part, dim]"""
    held = jnp.stack([x[pages] for x in kv])[..., :dim]
    return held.reshape(*held.shape[:3], -1, kv[0].ndim - 2, dim)


@partial(jax.jit, donate_argnums=0)
def _import(kv: list[jax.Array], pages: jax.Array, data: jax.Array) -> list[jax.Array]:
    """`data` [array, page, slot, head, part, C]."""
    return [x.at[pages].set(part.reshape(-1, *x.shape[1:])) for x, part in zip(kv, data, strict=True)]
