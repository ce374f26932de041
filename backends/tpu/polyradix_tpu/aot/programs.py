"""What is compiled: the whole step of a model, and the kernels' own samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from math import prod
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from polyradix.backend.alone import Alone
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.errors import ModelError
from polyradix.graph.spec import ModelSpec
from polyradix_tpu import kernels
from polyradix_tpu.aot.chips import Chip, topology
from polyradix_tpu.aot.gates import Program
from polyradix_tpu.batch import Shape
from polyradix_tpu.kernels import Kernels
from polyradix_tpu.mesh import HEADS, LANES, MeshCollectives, abstract, cache_shape, kv_page_bytes
from polyradix_tpu.ops import JaxOps
from polyradix_tpu.program import jit_step

PAGE, SEQS, TOKENS, CONTEXT = 16, 64, 2048, 8192
SCRATCH = 1 << 28  # bytes of temporaries that pass where the cache is small
FILL = 0.9  # of the memory that the weights leave: the cache's


def read_model(name: str) -> ModelSpec:
    """`name` is that of a config beside this file, or the path of one. Raises ModelError."""
    own = {p.stem: p for p in Path(__file__).parent.glob("*.json")}
    path = own.get(name, Path(name))
    if not path.is_file():
        raise ModelError(f"model is {name!r}; expected one of {', '.join(own)}, or the path of a config.json")
    return ModelSpec.from_hf_config(json.loads(path.read_text()))


def steps(chip: Chip, spec: ModelSpec, tp: int, chosen: Kernels) -> Iterator[Program]:
    """Decode and prefill, with a cache as large as the weights allow. Raises MemoryError if they leave none."""
    mesh = topology(chip, tp)
    context = min(CONTEXT, spec.max_position)
    table = param_specs(spec, spec.dtype, context)
    top, *layers = ({p.name: abstract(mesh, p) for p in params} for params in (table.top, *table.layers))
    kv_spec = spec.kv_spec(PAGE, spec.dtype)
    each = kv_page_bytes(kv_spec, tp, LANES)
    weights = sum(_bytes(x) for x in jax.tree.leaves((top, layers)))
    pages = max(0, int((chip.hbm - weights) * FILL) // each)
    if pages < 2:
        raise MemoryError(
            f"the weights take {weights:,} bytes of each device and {chip.hbm:,} are there: room for {pages} pages of "
            "cache; raise tp"
        )
    kv = [struct(cache_shape(kv_spec, pages, LANES), spec.dtype, mesh, HEADS) for _ in range(spec.layers)]
    layer = pages * each // spec.layers  # with fewer bytes of temporaries, no layer's cache was copied
    program = jit_step(make_step(spec), JaxOps(Alone() if tp == 1 else MeshCollectives(tp), chosen), mesh)
    said = {} if tp == 1 else {"all-reduce": 2 * spec.layers, "all-gather": 1}
    for name, tokens, tile in (("decode", SEQS, 1), ("prefill", TOKENS, chosen.tile)):
        shape = Shape(tokens, SEQS, context // PAGE, tile)
        vector = struct((shape.length,), jnp.int32, mesh)

        def lower(vector: Any = vector, shape: Shape = shape) -> Any:
            return program.lower((top, layers), kv, vector, shape)

        yield Program(f"{name} step, {tokens} tokens", mesh, lower, pages * each, max(layer, SCRATCH), said)


def samples(chip: Chip) -> Iterator[Program]:
    """Of every kernel that has a folder: what its `samples()` yields is (label, function, arguments without values,
    numbers of the donated ones)."""
    mesh = topology(chip, 1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    for module in iter_modules(kernels.__path__):
        if not module.ispkg:
            continue
        for label, fn, args, donated in import_module(f"{kernels.__name__}.{module.name}").samples():
            placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), args)

            def lower(fn: Any = fn, placed: Any = placed, donated: Any = donated) -> Any:
                return jax.jit(fn, donate_argnums=donated).lower(*placed)

            alias = sum(_bytes(x) for i in donated for x in jax.tree.leaves(placed[i]))
            yield Program(f"{module.name}: {label}", mesh, lower, alias, alias or None, {})


def struct(shape: tuple[int, ...], dtype: Any, mesh: Any, split: PartitionSpec = PartitionSpec()) -> Any:  # noqa: B008
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))


def _bytes(x: Any) -> int:
    """Of one device."""
    return int(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)
