"""Models on the Hugging Face Hub: their files, or safetensors' headers alone. Raises CheckpointError, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polyradix.backend.protocol import HostArray
from polyradix.graph.errors import CheckpointError

_TEXT = ["*.json", "*.jinja"]
_WEIGHTS = "*.safetensors"
_COPIES = ["consolidated*", "*/*"]  # the same weights under other names
_AT_ONCE = 8  # headers that are asked for


def fetch(model: str, revision: str | None, here: bool = False) -> Path:
    """The folder of a model's text and safetensors; `here`: without asking the Hub."""
    for without in (_COPIES, _COPIES[1:]):  # some have Mistral's own format alone
        folder = _snapshot(model, revision, [*_TEXT, _WEIGHTS], without, here)
        if any(folder.glob(_WEIGHTS)):
            return folder
    raise _no_weights(model)


def fetch_text(model: str, revision: str | None) -> Path:
    return _snapshot(model, revision, _TEXT, _COPIES[1:])


def fetch_gguf(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = model.split("/", 2)
    with _errors(f"{model}: no such file here, and it"):
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))


def outline(model: str, revision: str | None, folder: Path) -> Path:
    """`folder`, with a model's text, and safetensors whose headers are right: after them the files are holes."""
    from huggingface_hub import HfApi

    text = fetch_text(model, revision)
    for file in (file for pattern in _TEXT for file in text.glob(pattern)):
        shutil.copy(file, folder)
    api, q = HfApi(), _quantisation(folder)
    with _errors(f"{model}:"), ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [name for name in api.list_repo_files(model, revision=revision) if Path(name).match(_WEIGHTS)]
        names = [name for name in found if "/" not in name]
        names = [name for name in names if not name.startswith("consolidated")] or names
        read = partial(api.parse_safetensors_file_metadata, model, revision=revision)
        for name, header in zip(names, pool.map(read, names), strict=True):
            _write(folder / name, header.tensors, q)
    if not names:
        raise _no_weights(model)
    return folder


def _no_weights(model: str) -> CheckpointError:
    return CheckpointError(f"{model}: the repository has no {_WEIGHTS}; for a GGUF file give {model}/FILE.gguf")


def _quantisation(folder: Path) -> dict[str, Any]:
    """The config's, as it is: whoever opens the folder says what is wrong with it."""
    try:
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, tensors: dict[str, Any], q: dict[str, Any]) -> None:
    """Of GPTQ's tensors values of two kinds matter: the order of columns, and biases, which are left out if 0."""
    header = {n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets} for n, t in tensors.items()}
    text = json.dumps(header).encode()
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + max((end for t in tensors.values() for end in t.data_offsets), default=0))
        for name, t in tensors.items():
            if q.get("quant_method") == "gptq" and (value := _told(name, t.shape, q)) is not None:
                file.seek(start + t.data_offsets[0])
                file.write(value.tobytes()[: t.data_offsets[1] - t.data_offsets[0]])


def _told(name: str, shape: list[int], q: dict[str, Any]) -> HostArray | None:
    group = q.get("group_size")
    if name.endswith(".g_idx") and not q.get("desc_act") and isinstance(group, int) and len(shape) == 1:
        return (np.arange(shape[0]) // (group if group > 0 else max(1, shape[0]))).astype(np.int32)
    return np.ones(shape, np.float32) if name.endswith(".bias") else None


def _snapshot(model: str, revision: str | None, patterns: list[str], without: list[str], here: bool = False) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    with _errors(f"{model}:"):
        found = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=without, local_files_only=here
        )
        return Path(found)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the hub's errors share no base with those of its transport
        why = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(f"{what} cannot be fetched from the Hub: {why}") from e
