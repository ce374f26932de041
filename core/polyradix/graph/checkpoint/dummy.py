"""Random weights from a config alone: for speed tests and for trying an architecture."""

from __future__ import annotations

import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from polyradix.backend.protocol import HostArray
from polyradix.graph.checkpoint.base import Checkpoint, read_json, read_optional_json
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.spec import ModelSpec

BLOCK = 1 << 20


def open_dummy(path: Path) -> Checkpoint:
    """`path` is a config.json or its folder. Norms are 1, biases 0, all else N(0, 0.02) seeded by the tensor's name, in
    bfloat16; a tensor of more than BLOCK values repeats them."""
    file = path / "config.json" if path.is_dir() else path
    config, generation = read_json(file), read_optional_json(file.parent / "generation_config.json")
    shapes = tensor_shapes(ModelSpec.from_hf_config(config, generation))

    def read(name: str) -> HostArray:
        if name.endswith("norm.weight"):
            return np.ones(shapes[name], np.float32)
        if name.endswith(".bias"):
            return np.zeros(shapes[name], np.float32)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        size = int(np.prod(shapes[name]))
        block = rng.standard_normal(min(size, BLOCK), np.float32) * np.float32(0.02)
        return np.resize(block.astype(ml_dtypes.bfloat16), shapes[name])

    return Checkpoint(
        source=f"{file} (random weights)",
        config=config,
        generation_config=generation,
        names=shapes.keys(),
        read=read,
        where=lambda name: str(file),
        folder=file.parent,
        dummy=True,
    )
