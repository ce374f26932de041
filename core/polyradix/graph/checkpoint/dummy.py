"""Random weights from a config alone: for speed tests and for trying an architecture."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from polyradix.backend.protocol import HostArray, Quant
from polyradix.graph.checkpoint.base import Checkpoint, Parts, Stored, read_json, read_optional_json
from polyradix.graph.config import Config
from polyradix.graph.dense import tensor_shapes
from polyradix.graph.quantisation import Quantisation, read_quantisation
from polyradix.graph.spec import ModelSpec

STEP = 64
STARTS = 1 << 20
SCALE = np.float32(2**-10)  # of FP8


def open_dummy(path: Path) -> Checkpoint:
    """`path` is a config.json or its folder. Norms are 1, biases 0, all else N(0, 0.02) in bfloat16: views of one row
    of random numbers, in which a tensor starts where its name says, and each of its rows STEP further. With a
    quantization_config for FP8 projections are FP8; other formats are left out."""
    file = path / "config.json" if path.is_dir() else path
    config, generation = read_json(file), read_optional_json(file.parent / "generation_config.json")
    spec = ModelSpec.from_hf_config(config, generation)
    shapes = tensor_shapes(spec)

    longest = max(STEP * rows + width for rows, width in (s for s in shapes.values() if len(s) == 2))

    @cache
    def numbers() -> HostArray:
        random = np.random.default_rng(0).standard_normal(STARTS + longest, np.float32)
        return (random * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    @cache
    def codes() -> HostArray:
        return (numbers().astype(np.float32) / SCALE).astype(ml_dtypes.float8_e4m3fn)

    def view(random: HostArray, name: str) -> HostArray:
        *rows, width = shapes[name]
        start = zlib.crc32(name.encode()) % STARTS
        if not rows:
            return random[start : start + width]
        return sliding_window_view(random, width)[start : start + STEP * rows[0] : STEP]

    def read(name: str) -> HostArray:
        if name.endswith("norm.weight"):
            return np.full(shapes[name], 1 - spec.norm_offset, np.float32)
        if name.endswith(".bias"):
            return np.zeros(shapes[name], np.float32)
        return view(codes(), name).astype(np.float32) * SCALE if name in stored else view(numbers(), name)

    def eight(name: str, q: Quantisation) -> Stored:
        rows, columns = block = q.block or (1, shapes[name][1])
        blocks = -(-shapes[name][0] // rows), -(-shapes[name][1] // columns)
        quant, scale = Quant("fp8", block), np.full(blocks, SCALE)
        return Stored(
            f"random FP8 in blocks of {rows}x{columns}",
            quant.bytes(shapes[name]),
            Parts(quant, lambda: {"weight": view(codes(), name), "scale": scale}),
        )

    q = read_quantisation(Config(config))
    projections = [n for n in shapes if n.endswith(".weight") and ("_proj" in n or ".experts." in n)]
    stored = {name: eight(name, q) for name in projections} if q is not None and q.method == "fp8" else {}
    return Checkpoint(
        source=f"{file} (random weights)",
        config=config,
        generation_config=generation,
        names=shapes.keys(),
        read=read,
        where=lambda name: str(file),
        folder=file.parent,
        dummy=True,
        stored=stored,
    )
