from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads, Params
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.rope import Rope, rope_table
from polyradix.graph.spec import ModelSpec
from polyradix_tpu import entry
from polyradix_tpu.device import open_devices
from polyradix_tpu.mesh import make_mesh
from polyradix_tpu.program import jit_step

PAGE = 16
open_devices("cpu")  # four of them, whichever test comes first
SPEC = ModelSpec("LlamaForCausalLM", 3, 128, 192, Heads(8, 4, 32), 320, 512, 1e-5, Rope())


@dataclass
class Model:
    """A small seeded model on `tp` ranks, and its step as JAX compiles it."""

    backend: Any
    params: Params
    kv: Any
    program: Any
    spec: ModelSpec = SPEC

    @property
    def tree(self) -> Any:
        return self.params.top, self.params.layers


def pack(backend: Any, spec: Any, rng: np.random.Generator) -> Any:
    value = rng.standard_normal(spec.shape, np.float32) * spec.shape[-1] ** -0.5
    return backend.pack(
        spec, lambda part="weight": rope_table(SPEC.rope, *spec.shape) if spec.kind == "rope" else value
    )


@pytest.fixture
def model():
    def make(tp: int = 1, pages: int = 8, **options: Any) -> Model:
        backend, rng = entry.create(tp=tp, platform="cpu", **options), np.random.default_rng(3)
        table = param_specs(SPEC, "float32")
        layers = [{p.name: pack(backend, p, rng) for p in specs} for specs in table.layers]
        params = Params({p.name: pack(backend, p, rng) for p in table.top}, layers)
        kv = backend.alloc_kv(SPEC.kv_spec(PAGE, "float32"), pages)
        return Model(backend, params, kv, jit_step(make_step(SPEC), backend.ops, make_mesh(jax.devices(), tp)))

    return make


@pytest.fixture
def batch():
    """Sequences of random tokens, none cached, each with pages of its own."""

    def make(*lengths: int) -> HostBatch:
        total, cu_q = sum(lengths), np.cumsum([0, *lengths]).astype(np.int32)
        width = -(-max(lengths) // PAGE)
        pages = np.arange(1, 1 + len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
        positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        row_seq = np.repeat(np.arange(len(lengths)), lengths)
        return HostBatch(
            tokens=np.random.default_rng(total).integers(1, SPEC.vocab, total).astype(np.int32),
            positions=positions,
            slots=pages[row_seq, positions // PAGE] * PAGE + positions % PAGE,
            cu_q=cu_q,
            kv_len=np.array(lengths, np.int32),
            pages=pages,
            last=cu_q[1:] - 1,
            from_prev=np.full(total, -1, np.int32),
        )

    return make
