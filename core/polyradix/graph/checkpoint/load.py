"""From a checkpoint to packed parameters: fuse, cast, hand to the backend, one parameter at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from polyradix.backend.protocol import HOST_DTYPES, Backend, DType, HostArray, ParamPart, Params, ParamSpec, Quant
from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.checkpoint.keep import cuts, keep, report
from polyradix.graph.dense import param_specs, pieces, tensor_shapes
from polyradix.graph.errors import CheckpointError
from polyradix.graph.mla import row_order
from polyradix.graph.rope import rope_table
from polyradix.graph.spec import ModelSpec

log = logging.getLogger(__name__)

READERS = min(8, os.cpu_count() or 1)
_HARMLESS = ("rotary_emb.inv_freq",)  # computed here


def load_params(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: DType,
    backend: Backend,
    *,
    max_context: int | None = None,
    progress: bool = True,
) -> Params:
    """Packs every parameter, one at a time, while threads read the next READERS; these begin when the backend asks for
    the first. Raises CheckpointError naming the file and tensor at fault, MemoryError for a model larger than a device,
    both before a weight is read. The bar is for a terminal on stderr."""
    if "lm_head.weight" in checkpoint.names:  # a copy of the embeddings if they are tied, or what transformers prefers
        spec = replace(spec, tie_embeddings=False)
    _compare_names(checkpoint, spec)
    plain, tp = param_specs(spec, dtype, max_context), backend.collectives.size
    table = keep(plain, checkpoint, spec, backend.caps.features, tp)
    for line in report(table, checkpoint, spec):
        log.info("%s: %s", checkpoint.source, line)
    for line in cuts(plain, checkpoint, spec, backend.caps.features, tp):
        log.warning("%s", line)
    _check_room(table.bytes(tp), backend.memory().free)
    groups = [(None, table.top), *enumerate(table.layers)]
    reads = [_Read(checkpoint, spec, p, layer) for layer, params in groups for p in params]
    pool = ThreadPoolExecutor(READERS, "polyradix-read")
    ahead: dict[int, Future[Mapping[ParamPart, HostArray]]] = {}

    def read(index: int, part: ParamPart = "weight") -> HostArray:
        if part == "bias":
            return reads[index].bias()
        ahead.pop(index - 1, None)
        for i in range(index, min(index + 1 + READERS, len(reads))):
            if i not in ahead:
                ahead[i] = pool.submit(reads[i])
        return ahead[index].result()[part]

    bar = tqdm(reads, desc="Loading weights", unit="param", disable=None if progress else True, mininterval=0.2)
    try:
        packed = iter([backend.pack(r.spec, partial(read, i)) for i, r in enumerate(bar)])
    finally:
        pool.shutdown(cancel_futures=True)
    top, *layers = ({p.name: next(packed) for p in params} for _, params in groups)
    return Params(top, layers)


def _compare_names(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Before anything is read: what the config promises is there, and nothing that would silently be left out."""
    wanted = tensor_shapes(spec)
    missing = [name for name in wanted if name.endswith(".weight") and name not in checkpoint.names]
    if missing:
        raise CheckpointError(f"{checkpoint.source}: no tensor {missing[0]} ({len(missing)} missing)")
    unused = [name for name in checkpoint.names if name not in wanted and not name.endswith(_HARMLESS)]
    if unused:
        raise CheckpointError(f"{checkpoint.where(unused[0])}: tensor {unused[0]} has no place in {spec.architecture}")


def _check_room(size: int, free: int) -> None:
    if size > free:
        raise MemoryError(
            f"the weights take {size:,} bytes of each device and {free:,} are free: {size - free:,} too few; "
            "take a smaller model or dtype, or split it over more devices with tp"
        )


class _Read:
    """Reads one parameter."""

    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, spec: ParamSpec, layer: int | None) -> None:
        self.checkpoint, self.model, self.spec = checkpoint, model, spec
        self.pieces = pieces(model, spec, layer)
        self.order = None if model.latent is None else row_order(model.latent, spec.name)

    def __call__(self) -> Mapping[ParamPart, HostArray]:
        """What a backend's Reader gives, but for the bias."""
        spec = self.spec
        if spec.kind == "rope":
            local = self.model.local_rope if spec.name == "local_rope" else None
            return {"weight": rope_table(local or self.model.rope, *spec.shape)}
        if spec.quant is not None:
            return self._parts(spec.quant)
        weight = self._joined("weight", spec.shape[1:][-1:])
        if spec.kind == "norm":
            weight += self.model.norm_offset
        if spec.kind == "embed" and self.model.embed_scale != 1:  # rounded as a product in the step would be
            np.multiply(weight, weight.dtype.type(self.model.embed_scale), out=weight)
        return {"weight": weight.reshape(spec.shape)}

    def bias(self) -> HostArray:
        if not any(f"{name}.bias" in self.checkpoint.names for name, _ in self.pieces):
            raise CheckpointError(
                f"{self.checkpoint.source}: no tensor {self.pieces[0][0]}.bias; the config promises it"
            )
        return self._joined("bias", ()).reshape(self.spec.shape[:-1] or self.spec.shape)

    def _joined(self, part: str, tail: tuple[int, ...]) -> HostArray:
        out = np.empty((sum(rows for _, rows in self.pieces), *tail), HOST_DTYPES[self.spec.dtype])
        start = 0
        for name, count in self.pieces:
            _copy(self._tensor(f"{name}.{part}", (count, *tail)), out[start : start + count])
            start += count
        return out if self.order is None else out[self.order]

    def _parts(self, quant: Quant) -> Mapping[ParamPart, HostArray]:
        """Codes, scales and zeros, as the checkpoint has them."""
        each = [p.read() for name, _ in self.pieces if (p := self.checkpoint.stored[f"{name}.weight"].parts)]
        whole = {part: np.concatenate([parts[part] for parts in each]) for part in each[0]}
        if self.order is not None:
            blocks = self.order[:: quant.block[0]] // quant.block[0]
            whole = {part: x[self.order if part == "weight" else blocks] for part, x in whole.items()}
        return {part: x.reshape(*self.spec.shape[:-2], -1, x.shape[-1]) for part, x in whole.items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> HostArray:
        if name.endswith(".bias") and name not in self.checkpoint.names:
            return np.zeros(shape, np.float32)
        return self.checkpoint.tensor(name, shape)


def _copy(value: HostArray, out: HostArray) -> None:
    """Bits where the dtypes are the same: NumPy keeps Python's lock while it copies bfloat16."""
    if value.dtype == out.dtype:
        bits = f"u{out.itemsize}"
        value, out = value.view(bits), out.view(bits)
    out[...] = value
