"""Attention over the paged cache, and products grouped by expert: `xla` runs anywhere; a Pallas kernel has a folder of
its own and the same signature.

`Attend` takes q [T,Hq,D], the layer's cache [pages, page, 2*Hk, C] with this batch's k and v already in it, the batch,
and the rank's AttnSpec; it gives [T,Hq,D] in q's dtype. `Write` takes k and v [T,Hk,D] and gives the new cache. Keys
and values of one head are neighbours: head h has its keys in row 2h, its values in row 2h + 1. C is D, or more with
zeros from D on: a TPU stores multiples of 128, and of a narrower array it may make pages the last axis. `Grouped` is
grouped_matmul's, `Latent` the first result of mla_attention, `Score` index_scores'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.protocol import AttnSpec
from polyradix_tpu import batch
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels import grouped_matmul, index_scores, kv_write, xla
from polyradix_tpu.kernels import mla_attention as mla
from polyradix_tpu.kernels import ragged_paged_attention as ragged
from polyradix_tpu.kernels.grouped_matmul import validate
from polyradix_tpu.kernels.mla_attention.sparse import Score
from polyradix_tpu.kernels.mla_attention.validate import problems as latent_problems

Attend: TypeAlias = Callable[[jax.Array, jax.Array, JaxMeta, AttnSpec], jax.Array]
Write: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, JaxMeta], jax.Array]
Grouped: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Latent: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, JaxMeta, float], jax.Array]

NAMES = ("auto", "pallas", "xla")


def _latent_xla(q_latent: jax.Array, q_rope: jax.Array, cache: jax.Array, m: JaxMeta, scale: float) -> jax.Array:
    return mla.mla_attention_xla(q_latent, q_rope, cache, m, scale)[0]


def _latent_pallas(*args: Any, interpret: Any = False) -> jax.Array:
    return mla.mla_attention(*args, interpret=interpret)[0]


def _latent(q_latent: jax.Array, q_rope: jax.Array, cache: jax.Array, m: JaxMeta, scale: float) -> jax.Array:
    blocks = mla.choose(q_latent.shape[1], cache.shape[1], m.shape)
    found = latent_problems(q_latent, q_rope, cache, m.shape, blocks)
    return (_latent_xla if found else _latent_pallas)(q_latent, q_rope, cache, m, scale)


@dataclass(frozen=True)
class Kernels:
    """What was chosen, under the name that the capabilities' notes show, and the rows of a tile that suit it."""

    name: str
    write: Write
    attend: Attend
    grouped: Grouped
    tile: int = batch.TILE
    latent: Latent = _latent_xla
    scores: Score = index_scores.scores_xla


def _scores(
    index: jax.Array, weights: jax.Array, cache: jax.Array, pages: jax.Array, until: jax.Array, first: int
) -> jax.Array:
    args = index, weights, cache, pages, until, first
    found = index_scores.problems(*args, index_scores.choose(index, cache, pages))
    return (index_scores.scores_xla if found else index_scores.scores)(*args)


def _write(k: jax.Array, v: jax.Array, kv: jax.Array, m: JaxMeta) -> jax.Array:
    return (xla if kv_write.problems(k, kv) else kv_write).write(k, v, kv, m)


def _attend(q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec) -> jax.Array:
    return (xla if ragged.problems(q, kv, m.shape, a) else ragged).attend(q, kv, m, a)


def _grouped(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    found = validate.problems(lhs, rhs, sizes, grouped_matmul.choose(lhs, rhs))
    return (grouped_matmul.xla if found else grouped_matmul.grouped_matmul)(lhs, rhs, sizes)


XLA = Kernels("XLA", xla.write, xla.attend, grouped_matmul.xla)
"""Attention in plain XLA: pages are gathered, tile by tile, and a masked softmax covers all of a bucket's context."""

PALLAS = Kernels(
    "Pallas",
    kv_write.write,
    ragged.attend,
    grouped_matmul.grouped_matmul,
    ragged.TILE,
    _latent_pallas,
    index_scores.scores,
)
"""Compiled for a TPU; raises ValueError for shapes that the kernels do not take."""

AUTO = Kernels(
    "Pallas, and XLA for shapes that it does not take", _write, _attend, _grouped, ragged.TILE, _latent, _scores
)


def choose(name: str, on_tpu: bool) -> Kernels:
    """`auto` is Pallas on a TPU and XLA elsewhere, where `pallas` is interpreted. Raises ValueError for other names."""
    if name not in NAMES:
        raise ValueError(f"kernels is {name!r}; expected one of {', '.join(NAMES)}")
    if name == "xla" or (name == "auto" and not on_tpu):
        return XLA
    if on_tpu:
        return AUTO if name == "auto" else PALLAS
    interpret = pltpu.InterpretParams()
    own = (kv_write.write, ragged.attend, grouped_matmul.grouped_matmul, _latent_pallas, index_scores.scores)
    write, attend, grouped, latent, scores = (partial(f, interpret=interpret) for f in own)
    return Kernels("Pallas, interpreted", write, attend, grouped, latent=latent, scores=scores)
