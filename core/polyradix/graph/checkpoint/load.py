"""From a checkpoint to packed parameters: fuse, cast, hand to the backend, one parameter at a time."""

from __future__ import annotations

from typing import Literal

import numpy as np
from tqdm import tqdm

from polyradix.backend.protocol import HOST_DTYPES, Backend, DType, HostArray, Params, ParamSpec, Weight
from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.dense import param_specs, sources, tensor_shapes
from polyradix.graph.errors import CheckpointError
from polyradix.graph.rope import rope_table
from polyradix.graph.spec import ModelSpec

_HARMLESS = ("rotary_emb.inv_freq", "lm_head.weight")  # computed here; a copy of the embeddings if they are tied


def load_params(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: DType,
    backend: Backend,
    *,
    max_context: int | None = None,
    progress: bool = True,
) -> Params:
    """Packs every parameter. Raises CheckpointError naming the file and tensor at fault. The bar goes to stderr."""
    _compare_names(checkpoint, spec)
    table = param_specs(spec, dtype, max_context)
    total = len(table.top) + sum(map(len, table.layers))
    with tqdm(total=total, desc="Loading weights", unit="param", disable=not progress, mininterval=0.2) as bar:

        def pack(params: tuple[ParamSpec, ...], layer: int | None) -> dict[str, Weight]:
            out = {}
            for p in params:
                out[p.name] = backend.pack(p, _Read(checkpoint, spec, p, layer))
                bar.update()
            return out

        return Params(pack(table.top, None), [pack(params, i) for i, params in enumerate(table.layers)])


def _compare_names(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Before anything is read: what the config promises is there, and nothing that would silently be left out."""
    wanted = tensor_shapes(spec)
    missing = [name for name in wanted if name.endswith(".weight") and name not in checkpoint.names]
    if missing:
        raise CheckpointError(f"{checkpoint.source}: no tensor {missing[0]} ({len(missing)} missing)")
    unused = [name for name in checkpoint.names if name not in wanted and not name.endswith(_HARMLESS)]
    if unused:
        raise CheckpointError(f"{checkpoint.where(unused[0])}: tensor {unused[0]} has no place in {spec.architecture}")


class _Read:
    """The Reader of one parameter."""

    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, spec: ParamSpec, layer: int | None) -> None:
        self.checkpoint, self.model, self.spec = checkpoint, model, spec
        self.names = sources(model, spec.name, layer)

    def __call__(self, part: Literal["weight", "bias"] = "weight") -> HostArray:
        spec = self.spec
        if spec.kind == "rope":
            return rope_table(self.model.rope, *spec.shape)
        if part == "bias" and not any(f"{name}.bias" in self.checkpoint.names for name in self.names):
            raise CheckpointError(f"{self.checkpoint.source}: no tensor {self.names[0]}.bias; the config promises it")
        rows = spec.segments or spec.shape[:1]
        tail = spec.shape[1:] if part == "weight" else ()
        out = np.empty((sum(rows), *tail), HOST_DTYPES[spec.dtype])
        start = 0
        for name, count in zip(self.names, rows, strict=True):
            out[start : start + count] = self._tensor(f"{name}.{part}", (count, *tail))
            start += count
        return out

    def _tensor(self, name: str, shape: tuple[int, ...]) -> HostArray:
        if name.endswith(".bias") and name not in self.checkpoint.names:
            return np.zeros(shape, np.float32)
        return self.checkpoint.tensor(name, shape)
