"""A folder in Hugging Face's layout: config.json and one or several safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from polyradix.backend.protocol import HostArray
from polyradix.graph.checkpoint.base import Checkpoint, read_json, read_optional_json
from polyradix.graph.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def open_folder(folder: Path) -> Checkpoint:
    """Opens every file, so that a missing or cut one is found before anything is read."""
    files = {path: _open(path) for path in _files(folder)}
    owner = {name: path for path, handle in files.items() for name in handle.keys()}  # noqa: SIM118

    def read(name: str) -> HostArray:
        path = owner[name]
        try:
            value: HostArray = files[path].get_tensor(name)
        except (SafetensorError, TypeError, KeyError, AttributeError) as e:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {e}") from e
        if value.dtype.name not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"{path}: tensor {name} is {value.dtype.name}; expected a 16 or 32 bit float")
        return value

    return Checkpoint(
        source=str(folder),
        config=read_json(folder / "config.json"),
        generation_config=read_optional_json(folder / "generation_config.json"),
        names=owner.keys(),
        read=read,
        where=lambda name: str(owner[name]),
        folder=folder,
    )


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: weight_map is {weight_map!r}; expected names to files")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file: {e}") from e
