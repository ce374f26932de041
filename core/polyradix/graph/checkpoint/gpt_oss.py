"""Experts of gpt-oss, one tensor for all of a layer with gate and up rows in turns, seen as some for each expert.

Published in MXFP4, blocks [experts, out, in / 32, 16] and scales [experts, out, in / 32]; transformers writes plain
ones [experts, in, out]. Source: transformers' models/gpt_oss/modeling_gpt_oss.py and integrations/mxfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from polyradix.backend.protocol import HostArray
from polyradix.graph import moe
from polyradix.graph.checkpoint import mxfp4
from polyradix.graph.checkpoint.base import Checkpoint, Stored
from polyradix.graph.spec import ModelSpec

_BYTES = (np.dtype(np.uint8),)


@dataclass(frozen=True)
class _View:
    """Rows `rows` of one expert's weight [out, in], or with `bias` of its bias, in the tensors called `stem`..."""

    stem: str
    shape: tuple[int, int, int]  # experts, out, in
    expert: int
    rows: slice
    bias: bool

    def tensors(self, packed: bool) -> list[str]:
        kinds = ("_bias",) if self.bias else ("_blocks", "_scales") if packed else ("",)
        return [self.stem + kind for kind in kinds]

    def read(self, c: Checkpoint) -> HostArray:
        count, out, inner = self.shape
        at = self.expert, self.rows
        if self.bias:
            return c.tensor(f"{self.stem}_bias", (count, out))[at]
        if not self.packed(c):
            return c.tensor(self.stem, (count, inner, out))[self.expert, :, self.rows].T
        groups = (count, out, inner // mxfp4.GROUP)
        scales = c.tensor(f"{self.stem}_scales", groups, _BYTES)[at]
        return mxfp4.decode(c.tensor(f"{self.stem}_blocks", (*groups, mxfp4.GROUP // 2), _BYTES)[at], scales)

    def packed(self, c: Checkpoint) -> bool:
        return not self.bias and f"{self.stem}_blocks" in c.names


def unstacked(checkpoint: Checkpoint, spec: ModelSpec) -> Checkpoint:
    views = {name: v for name, v in _views(spec).items() if v.tensors(v.packed(checkpoint))[0] in checkpoint.names}
    used = {tensor for v in views.values() for tensor in v.tensors(v.packed(checkpoint))}
    stored = {
        name: Stored("MXFP4", len(range(v.shape[1])[v.rows]) * v.shape[2] * 17 // mxfp4.GROUP)
        for name, v in views.items()
        if v.packed(checkpoint)
    }

    def read(name: str) -> HostArray:
        return views[name].read(checkpoint) if name in views else checkpoint.read(name)

    def where(name: str) -> str:
        v = views.get(name)
        return checkpoint.where(name if v is None else v.tensors(v.packed(checkpoint))[0])

    names = (set(checkpoint.names) - used) | views.keys()
    return replace(checkpoint, names=names, read=read, where=where, stored=stored)


def _views(spec: ModelSpec) -> dict[str, _View]:
    assert spec.experts is not None
    x, n = spec.experts, moe.names(spec.architecture)
    count, inner, hidden = x.routing.experts, x.intermediate, spec.hidden
    parts = (
        (n.gate, "gate_up_proj", (count, 2 * inner, hidden), slice(0, None, 2)),
        (n.up, "gate_up_proj", (count, 2 * inner, hidden), slice(1, None, 2)),
        (n.down, "down_proj", (count, hidden, inner), slice(None)),
    )
    return {
        f"model.layers.{layer}.{name.format(e)}.{kind}": _View(
            f"model.layers.{layer}.mlp.experts.{tensor}", shape, e, rows, kind == "bias"
        )
        for layer in range(spec.layers)
        for name, tensor, shape, rows in parts
        for e in range(count)
        for kind in ("weight", "bias")
    }
