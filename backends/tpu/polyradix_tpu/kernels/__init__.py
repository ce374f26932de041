"""Attention over the paged cache: `xla` runs anywhere; a Pallas kernel has a folder of its own and the same signature.

`Attend` takes q [T,Hq,D], the layer's cache [pages, page, 2*Hk, D] with this batch's k and v already in it, the batch,
and the rank's AttnSpec; it gives [T,Hq,D] in q's dtype. `Write` takes k and v [T,Hk,D] and gives the new cache. Keys
and values of one head are neighbours: head h has its keys in row 2h, its values in row 2h + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax

from polyradix.backend.protocol import AttnSpec
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels import xla

Attend: TypeAlias = Callable[[jax.Array, jax.Array, JaxMeta, AttnSpec], jax.Array]
Write: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, JaxMeta], jax.Array]


@dataclass(frozen=True)
class Kernels:
    """What was chosen, under the name that the capabilities' notes show."""

    name: str
    write: Write
    attend: Attend


XLA = Kernels("XLA", xla.write, xla.attend)
