"""Tiny models, and the logits that transformers gives for them; `conformance/golden/make.py` made the files.

Weights are not stored: an integer hash of the tensor's name gives them, the same in every NumPy and exact in bfloat16.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import ml_dtypes
import numpy as np

from polyradix.backend.sampling import mix
from polyradix.graph.checkpoint import Checkpoint
from polyradix.graph.checkpoint.quantised import dequantised
from polyradix.graph.checkpoint.renamed import renamed
from polyradix.graph.checkpoint.stacked import unstacked
from polyradix.graph.spec import ModelSpec
from polyradix_conformance.inputs import Part
from polyradix_conformance.oracle import Arr

MANIFEST = "manifest.json"


class GoldenError(ValueError):
    """A golden file is missing or was changed."""


@dataclass(frozen=True)
class Rows:
    """Truth of R rows: logits [R,V] as float64 and, by dtype, how far an honest run may be from them, [R]."""

    logits: Arr
    floors: dict[str, Arr]

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.logits[rows], {dtype: f[rows] for dtype, f in self.floors.items()})


@dataclass(frozen=True)
class Golden:
    """One model and its truth. A sequence is a prompt and the greedy tokens after it, but for the last of them."""

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of the tensors in a checkpoint
    sequences: tuple[Arr, ...]
    prompts: tuple[int, ...]  # tokens of each sequence that are its prompt
    at: dict[tuple[int, int], int]  # the row of (sequence, position)
    rows: Rows
    rebound: Rows  # one row: the last of sequence `REBOUND`'s prompt, under the weights of seed 1

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_hf_config(self.config)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those in which an honest run must be near the truth. In bfloat16, rounding decides between experts of nearly
        the same score, and the logits after that are those of another model."""
        return ("float32",) if self.spec.experts else ("float32", "bfloat16")

    def ends(self, parts: Iterable[Part]) -> Rows:
        """The truth after the last token of each part."""
        return self.rows[[self.at[p.seq, p.stop - 1] for p in parts]]

    def greedy(self, seq: int) -> tuple[list[int], Rows]:
        """The tokens after the prompt, and what each was chosen from."""
        first, stop = self.prompts[seq], len(self.sequences[seq])
        rows = self.ends(Part(seq, 0, n) for n in range(first, stop + 1))
        return [int(row.argmax()) for row in rows.logits], rows

    def checkpoint(self, seed: int = 0) -> Checkpoint:
        name = f"golden model {self.name}"
        published = renamed(
            Checkpoint(
                source=name,
                config=self.config,
                names=self.shapes.keys() | {n + SCALE for n in self.shapes if quantised(self.config, n)},
                read=lambda tensor: self._tensor(tensor, seed),
                where=lambda tensor: name,
            )
        )
        return unstacked(dequantised(published))

    def _tensor(self, name: str, seed: int) -> Arr:
        plain = name.removesuffix(SCALE)
        if not quantised(self.config, plain):
            return weights(name, self.shapes[name], seed)
        codes, scale = fp8(plain, self.shapes[plain], seed)
        return codes if name == plain else scale


REBOUND = 3
SCALE = "_scale_inv"
BLOCK = 128


def quantised(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of a model with such a config is FP8."""
    return bool(config.get("quantization_config")) and name.endswith("_proj.weight")


@cache
def fp8(name: str, shape: tuple[int, ...], seed: int) -> tuple[Arr, Arr]:
    """The nearest codes to `weights`, and a scale for each BLOCK x BLOCK of them: of four bits, as codes have, so that
    the values are exact in bfloat16."""
    plain = weights(name, shape, seed)
    out = np.zeros(shape, ml_dtypes.float8_e4m3fn)
    scale = np.zeros([-(-n // BLOCK) for n in shape], np.float32)
    for at in np.ndindex(scale.shape):
        block = tuple(slice(BLOCK * i, BLOCK * i + BLOCK) for i in at)
        scale[at] = (8 + 3 * sum(at) % 8) * 2.0 ** np.floor(np.log2(np.abs(plain[block]).max()) - 10)
        out[block] = (plain[block] / scale[at]).astype(out.dtype)
    return out, scale


@cache
def weights(name: str, shape: tuple[int, ...], seed: int = 0) -> Arr:
    """Pseudo-random float32 values with at most 8 significant bits, spread so that activations and scores are about 1
    to 3 and logits about 4. Read-only."""
    with np.errstate(over="ignore"):
        index = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9)
        h = mix(mix(index ^ np.uint32(zlib.crc32(f"{seed} {name}".encode()))))
    centred = (h % np.uint32(255)).astype(np.int32) - 127
    if name.endswith("norm.weight"):
        out = (128 + centred // 2) / 128
    elif len(shape) == 1 or "embed" in name:
        out = centred / 128
    else:
        gain = 2 if name.startswith("lm_head") else 1
        out = centred * gain / 2 ** (6 + (shape[-1].bit_length() - 1) // 2)
    value = out.astype(np.float32).reshape(shape)
    value.flags.writeable = False
    return value


@cache
def families() -> tuple[str, ...]:
    """The names of the golden models."""
    return tuple(sorted(name.removesuffix(".npz") for name in _hashes() if name.endswith(".npz")))


@cache
def load(name: str) -> Golden:
    """Raises GoldenError if a file is not the one that was made."""
    about = json.loads(_read(f"{name}.json"))
    arrays = np.load(io.BytesIO(_read(f"{name}.npz")))
    cuts = np.cumsum(arrays["lengths"])[:-1]
    return Golden(
        name=name,
        config=about["config"],
        shapes={tensor: tuple(shape) for tensor, shape in about["shapes"].items()},
        sequences=tuple(np.split(arrays["tokens"], cuts)),
        prompts=tuple(arrays["prompts"].tolist()),
        at={(seq, position): row for row, (seq, position) in enumerate(arrays["at"].tolist())},
        rows=_rows(arrays, ""),
        rebound=_rows(arrays, "rebound_"),
    )


def _rows(arrays: Any, prefix: str) -> Rows:
    floors = {dtype: arrays[f"{prefix}floor_{dtype}"].astype(np.float64) for dtype in ("float32", "bfloat16")}
    return Rows(arrays[f"{prefix}logits"].astype(np.float64), floors)


@cache
def _hashes() -> dict[str, str]:
    hashes: dict[str, str] = json.loads((files(__name__) / MANIFEST).read_text())["sha256"]
    return hashes


def _read(name: str) -> bytes:
    try:
        data = (files(__name__) / name).read_bytes()
    except OSError as e:
        raise GoldenError(f"golden file {name}: unreadable: {e}") from e
    found, expected = hashlib.sha256(data).hexdigest(), _hashes().get(name)
    if found != expected:
        raise GoldenError(f"golden file {name} has sha256 {found}; expected {expected}, as {MANIFEST} says")
    return data
