"""A folder in Hugging Face's layout, config.json and safetensors files, or in Mistral's, params.json instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from polyradix.backend.protocol import HostArray
from polyradix.graph.checkpoint import mistral
from polyradix.graph.checkpoint.base import Checkpoint, read_json, read_optional_json
from polyradix.graph.errors import CheckpointError

INDEXES = "model.safetensors.index.json", "consolidated.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
}


def open_folder(folder: Path) -> Checkpoint:
    """Opens every file, so that a missing or cut one is found before anything is read. Tensors are views of the files,
    which any number of threads may read."""
    files = {path: _open(path) for path in _files(folder)}
    owner: dict[str, Path] = {}
    for path, (header, _) in files.items():
        for name in header:
            if owner.setdefault(name, path) != path:
                raise CheckpointError(f"{path}: tensor {name} is in {owner[name].name}, too; expected one of it")

    def read(name: str) -> HostArray:
        path = owner[name]
        header, data = files[path]
        kind, shape, (start, stop) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {kind}; expected {', '.join(DTYPES)}")
        value: HostArray = data[start:stop].view(DTYPES[kind]).reshape(shape)
        return value

    return Checkpoint(
        source=str(folder),
        config=_config(folder),
        generation_config=read_optional_json(folder / "generation_config.json"),
        names=owner.keys(),
        read=read,
        where=lambda name: str(owner[name]),
        folder=folder,
    )


def _config(folder: Path) -> dict[str, Any]:
    params = folder / mistral.PARAMS
    if params.is_file() and not (folder / "config.json").is_file():
        return mistral.hf_config(read_json(params))
    return read_json(folder / "config.json")


def _files(folder: Path) -> list[Path]:
    for index in (folder / name for name in INDEXES if (folder / name).is_file()):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is {weight_map!r}; expected names to files")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: weight_map has {name!r} for {tensor}; expected a file of this folder")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    return found


def _open(path: Path) -> tuple[dict[str, Any], HostArray]:
    """The header and the bytes after it. Format: safetensors' README, "Format"."""
    try:
        with safe_open(path, framework="np"):  # refuses a file that is not whole
            pass
        data = np.memmap(path, np.uint8, "r")
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file: {e}") from e
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    return header, data[8 + size :]
