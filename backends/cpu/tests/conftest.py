"""A small seeded model, run step by step on whatever kernels the environment asks for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads, Limits, Params
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.rope import Rope, rope_table
from polyradix.graph.spec import ModelSpec
from polyradix_cpu import entry

PAGE, PAGES, CONTEXT = 16, 40, 128
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    layers=2,
    hidden=96,
    intermediate=160,
    heads=Heads(6, 2, 32),
    vocab=320,
    max_position=CONTEXT,
    rms_eps=1e-5,
    rope=Rope(),
    qkv_bias=True,
)


class Model:
    """Feeds sequences chunk by chunk; each owns its pages."""

    def __init__(self, dtype: str, backend=None) -> None:
        self.backend = backend or entry.create()
        rng = np.random.default_rng(3)

        def pack(spec):
            if spec.kind == "rope":
                return self.backend.pack(spec, lambda part="weight": rope_table(SPEC.rope, *spec.shape))
            scale = 1.0 if spec.kind in ("embed", "norm") else spec.shape[-1] ** -0.5
            parts = {"weight": rng.standard_normal(spec.shape) * scale, "bias": rng.standard_normal(spec.shape[:1])}
            return self.backend.pack(spec, lambda part="weight": parts[part].astype(KINDS[spec.dtype]))

        table = param_specs(SPEC, dtype, CONTEXT)
        layers = [{p.name: pack(p) for p in specs} for specs in table.layers]
        self.params = Params({p.name: pack(p) for p in table.top}, layers)
        self.kv = self.backend.alloc_kv(SPEC.kv_spec(PAGE, dtype), PAGES)
        self.run = self.backend.compile(make_step(SPEC), Limits(256, 16, CONTEXT))
        self.done: dict[str, int] = {}
        self.owned: dict[str, list[int]] = {}
        self.free = list(np.random.default_rng(5).permutation(np.arange(1, PAGES)))

    def feed(self, chunks: dict[str, np.ndarray]) -> np.ndarray:
        """Logits [S,V] float32 of each sequence's last token."""
        positions, slots = [], []
        for name, tokens in chunks.items():
            start = self.done.get(name, 0)
            self.done[name] = stop = start + len(tokens)
            pages = self.owned.setdefault(name, [])
            pages += [int(self.free.pop()) for _ in range(-(-stop // PAGE) - len(pages))]
            positions += range(start, stop)
            slots += [pages[p // PAGE] * PAGE + p % PAGE for p in range(start, stop)]
        table = np.zeros((len(chunks), CONTEXT // PAGE), np.int32)
        for row, name in enumerate(chunks):
            table[row, : len(self.owned[name])] = self.owned[name]
        cu_q = np.cumsum([0] + [len(t) for t in chunks.values()]).astype(np.int32)
        tokens = np.concatenate(list(chunks.values())).astype(np.int32)
        batch = HostBatch(
            tokens=tokens,
            positions=np.array(positions, np.int32),
            slots=np.array(slots, np.int32),
            cu_q=cu_q,
            kv_len=np.array([self.done[name] for name in chunks], np.int32),
            pages=table,
            last=cu_q[1:] - 1,
            from_prev=np.full(len(tokens), -1, np.int32),
        )
        logits, self.kv = self.run(self.params, self.kv, self.backend.prepare(batch))
        return self.backend.fetch(logits).result()[: len(chunks)].copy()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def model(dtype):
    return lambda backend=None: Model(dtype, backend)


@pytest.fixture
def prompt():
    return np.random.default_rng(11).integers(0, SPEC.vocab, 77)
