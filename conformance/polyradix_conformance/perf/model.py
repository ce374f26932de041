"""A decode step of a whole model, timed as it is: the core's own graph, against a second one in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyradix.backend.protocol import Params, ParamSpec
from polyradix.graph.dense import make_step, param_specs
from polyradix.graph.spec import ModelSpec
from polyradix_conformance import oracle
from polyradix_conformance.oracle import Arr, Precision
from polyradix_conformance.perf import truth
from polyradix_conformance.perf.program import Caches, Program, Shape, Subject, checker, normal, weights
from polyradix_conformance.perf.subjects import rope_table
from polyradix_conformance.rig import Rig


class Model:
    """Random weights; those of layer i are turned by i rows, so that the host holds one layer."""

    def __init__(self, spec: ModelSpec, dtype: Any, context: int) -> None:
        self.spec, self.table = spec, param_specs(spec, dtype, context)
        self._host = {p.name: self._values(p, dtype) for p in (*self.table.top, *self.table.layers[0])}

    def value(self, name: str, layer: int = 0) -> Arr:
        return np.roll(self._host[name], layer, axis=0) if layer else self._host[name]

    def params(self, rig: Rig) -> Params:
        def pack(p: ParamSpec, layer: int) -> Any:
            return rig.backend.pack(p, lambda part="weight": self.value(p.name, layer))

        layers = [{p.name: pack(p, i) for p in layer} for i, layer in enumerate(self.table.layers)]
        return Params({p.name: pack(p, 0) for p in self.table.top}, layers)

    def _values(self, p: ParamSpec, dtype: str) -> Arr:
        if p.kind == "rope":
            return rope_table(*p.shape)
        if p.kind == "norm":
            return normal(p.name, p.shape, dtype, 0.1, 1.0)
        return normal(p.name, p.shape, dtype) if p.kind == "embed" else weights(p.name, p.shape[0], p.shape[1], dtype)

    def rows(self, p: Precision, seqs: list[int], position: int, caches: Caches) -> Arr:
        """Logits [seqs,V]; sequence s decodes token s at `position`."""
        spec, heads = self.spec, self.spec.heads

        def linear(x: Arr, name: str, layer: int) -> Arr:
            return truth.linear(p, x, self.value(name, layer))

        def norm(x: Arr, name: str, layer: int = 0) -> Arr:
            return oracle.rms_norm(p, x, self.value(name, layer), spec.rms_eps)

        h = self.value("embed")[seqs]
        x = norm(h, "first_norm")
        for i in range(spec.layers):
            y = linear(x, "qkv", i).reshape(len(seqs), -1, heads.dim)
            v = y[:, -heads.kv :]
            y = oracle.rope(p, y, self.value("rope"), np.full(len(seqs), position))
            outs = []
            for s, seq in enumerate(seqs):
                held = caches.of(i, seq)[:, :position]
                keys = np.concatenate([held[0], y[s : s + 1, heads.q : -heads.kv]])
                values = np.concatenate([held[1], v[s : s + 1]])
                outs.append(truth.attend(p, y[s, : heads.q], keys, values, heads.dim**-0.5).ravel())
            h = oracle.add(p, h, linear(np.stack(outs), "o", i))
            g = oracle.gated(p, linear(norm(h, "mlp_norm", i), "gate_up", i))
            h = oracle.add(p, h, linear(g, "down", i))
            x = norm(h, "next_norm", i)
        return truth.linear(p, x, self.value("logits"), final=True)


def decode(rig: Rig, spec: ModelSpec, seqs: int, context: int) -> Subject:
    """One token each of `seqs` sequences of `context` tokens."""
    shape, model = Shape(seqs, 1, context), Model(spec, rig.dtype, context)
    caches = Caches(spec.heads, context, rig.dtype)
    program = Program(rig, make_step(spec), model.params(rig), shape, spec.heads, caches)

    def formula(p: Precision) -> Arr:
        return model.rows(p, shape.checked, context - 1, caches)

    return Subject(program, checker(rig, shape, formula, final=True))
