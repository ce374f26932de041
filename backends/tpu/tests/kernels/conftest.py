"""Pallas kernels in JAX's interpreter of a TPU, which looks for races; against definitions in NumPy float64."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("NPROC", "8")  # fewer threads deadlock the interpreter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_tpu.batch import Ladder, Shape, pack, unpack
from polyradix_tpu.kernels.kv_write import reference as write_reference
from polyradix_tpu.kernels.ragged_paged_attention import reference, validate

SMALL = {"block_bytes": 1 << 13, "items": 2, "cores": 1}  # blocks of few tokens, so that there are several


@dataclass
class Case:
    """Seeded data: pages shuffled, and NaN wherever no sequence has a key."""

    host: HostBatch
    shape: Shape
    q: Any  # [T,Hq,D], T of the bucket
    k: Any
    v: Any
    kv: Any

    def attend(self, attend: Any, a: AttnSpec, **options: Any) -> Any:
        """As `attend` computes it, and as it is defined."""
        out = jax.jit(lambda *x: attend(x[0], x[1], unpack(x[2], self.shape), a, **options))(
            self.q, self.kv, pack(self.host, self.shape)
        )
        rows = self.host.num_tokens
        wanted = reference.attend(np.asarray(self.q)[:rows], np.asarray(self.kv), self.host, a)
        return np.asarray(out, np.float64)[:rows], wanted

    def write(self, write: Any, **options: Any) -> Any:
        """The same of a write; without the scratch page."""
        out = jax.jit(lambda k, v, kv, x: write(k, v, kv, unpack(x, self.shape), **options))(
            self.k, self.v, self.kv, pack(self.host, self.shape)
        )
        wanted = write_reference.write(*(np.asarray(x) for x in (self.k, self.v, self.kv)), self.host)
        return np.asarray(out, np.float64)[1:], wanted.astype(np.float64)[1:]


def make_batch(rng: np.random.Generator, q_len: Sequence[int], kv_len: Sequence[int], page: int) -> HostBatch:
    counts = -(-np.array(kv_len) // page)
    ids = np.split(rng.permutation(np.arange(1, 1 + counts.sum())), np.cumsum(counts)[:-1])
    pages = np.zeros((len(counts), counts.max()), np.int32)
    for row, own in zip(pages, ids, strict=True):
        row[: len(own)] = own
    cu_q = np.cumsum([0, *q_len]).astype(np.int32)
    positions = np.concatenate([np.arange(k - n, k) for n, k in zip(q_len, kv_len, strict=True)]).astype(np.int32)
    seq = np.repeat(np.arange(len(q_len)), q_len)
    return HostBatch(
        tokens=np.ones(len(seq), np.int32),
        positions=positions,
        slots=pages[seq, positions // page] * page + positions % page,
        cu_q=cu_q,
        kv_len=np.array(kv_len, np.int32),
        pages=pages,
        last=cu_q[1:] - 1,
        from_prev=np.full(len(seq), -1, np.int32),
    )


@pytest.fixture
def case():
    def make(
        q_len: Sequence[int], kv_len: Sequence[int], heads: Heads, page: int, dtype: str, width: int = 0, tile: int = 16
    ) -> Case:
        rng = np.random.default_rng(sum(kv_len))
        host = make_batch(rng, q_len, kv_len, page)
        shape = Ladder(2, tile).shape(host)
        width = width or heads.dim
        kv = np.full((host.pages.max() + 1, page, 2 * heads.kv, width), np.nan)
        for row, length in zip(host.pages, host.kv_len, strict=True):
            for at in range(length):
                kv[row[at // page], at % page] = 0
                kv[row[at // page], at % page, :, : heads.dim] = rng.standard_normal((2 * heads.kv, heads.dim))
        q, k, v = (
            jnp.asarray(rng.standard_normal((shape.tokens, n, heads.dim)), dtype) for n in (heads.q, heads.kv, heads.kv)
        )
        return Case(host, shape, q, k, v, jnp.asarray(kv, dtype))

    return make


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The table of block sizes, to be changed."""
    table = {"flat": {**SMALL, "buffers": 3}, "split": {**SMALL, "buffers": 2, "items": 1}}
    monkeypatch.setattr(validate, "tuned", lambda _: table)
    return table


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def races():
    """Whether a race was found since the test began."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return lambda: interpret_pallas_call.races.races_found


@pytest.fixture
def wrong_plan(monkeypatch):
    """Makes a kernel's plan name, in one field, what comes one before."""

    def plant(kernel: Any, field: str) -> None:
        plan = kernel.plan

        def wrong(*args: Any) -> Any:
            p = plan(*args)
            return p._replace(**{field: jnp.maximum(getattr(p, field) - 1, 0)})

        monkeypatch.setattr(kernel, "plan", wrong)

    return plant
