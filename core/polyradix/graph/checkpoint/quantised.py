"""A quantised checkpoint, seen as one with plain weights; what it has instead of them is in Checkpoint.stored."""

from __future__ import annotations

from dataclasses import replace

from polyradix.backend.protocol import HostArray
from polyradix.backend.quant import dequantise
from polyradix.graph.checkpoint import fp8, int4
from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.config import Config
from polyradix.graph.quantisation import read_quantisation

_FORMATS = {"fp8": fp8, "awq": int4, "gptq": int4, "packed": int4}


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself if its config has no quantization_config. Raises ModelError for one that is not known, and
    CheckpointError naming the tensor that is not as it says."""
    q = read_quantisation(Config(checkpoint.config))
    if q is None or q.method not in _FORMATS:
        return checkpoint
    format = _FORMATS[q.method]
    stored = format.stored(checkpoint, q)
    plain = {name for name in checkpoint.names if name.rpartition(".")[2] not in format.PARTS}
    if q.method == "gptq":  # its writers gave every layer a bias, of zeros where the model has none
        biases = {f"{name.removesuffix('weight')}bias" for name in stored} & plain
        plain -= {name for name in biases if not checkpoint.read(name).any()}

    def read(name: str) -> HostArray:
        held = stored.get(name)
        if held is None or held.parts is None:
            return checkpoint.read(name)
        return dequantise(held.parts.quant, held.parts.read().__getitem__)

    def where(name: str) -> str:
        stem = name.removesuffix("weight")
        held = (name, f"{stem}qweight", f"{stem}weight_packed")
        return checkpoint.where(next(n for n in held if n in checkpoint.names))

    return replace(checkpoint, names=plain | stored.keys(), read=read, where=where, stored=stored)
