"""Makes the vendor's wheel importable without CANN: builds stand-ins for CANN's libraries from the wheel's own symbol
tables, loads them, and deletes the files. They live in this process alone."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from polyradix.backend.registry import DeviceUnavailable

LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")
ASKED = re.compile(r" U ((?:acl|rt[A-Z]|Hccl|Msprof|_ZN3atb)\w+)")
DEFINED = re.compile(r"^(?:int|const char \*)\s*(\w+)\(", re.MULTILINE)
SOURCE = Path(__file__).with_name("standins.c")


def load() -> None:
    """Once per process, before torch_npu is imported. Raises DeviceUnavailable without the wheel or a C compiler."""
    if "torch_npu" in sys.modules:
        return
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # else a kernel that cannot be launched is noticed in another thread
    with TemporaryDirectory() as folder:
        try:
            _build(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            raise DeviceUnavailable(f"emulation needs gcc and nm on the path: {error}") from error
        for name in LIBRARIES:
            ctypes.CDLL(f"{folder}/lib{name}.so", mode=ctypes.RTLD_GLOBAL)


def symbols() -> list[str]:
    """What the wheel's libraries want of CANN's, less what the stand-ins define themselves."""
    spec = find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise DeviceUnavailable("torch-npu is not installed")
    wheel = Path(spec.origin).parent
    libraries = [*wheel.glob("lib/*.so"), *wheel.glob("_C*.so")]
    table = subprocess.run(["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True)
    return sorted(set(ASKED.findall(table.stdout)) - set(DEFINED.findall(SOURCE.read_text())))


def _build(folder: Path) -> None:
    idle = "".join(f"int {name}(void) {{ return 0; }}\n" for name in symbols())
    (folder / "all.c").write_text(SOURCE.read_text() + idle)
    compiler = ["gcc", "-fPIC", "-w", "-O1"]
    subprocess.run([*compiler, "-c", "all.c", "-o", "all.o"], check=True, cwd=folder, capture_output=True)
    for name in LIBRARIES:
        soname = f"-Wl,-soname,lib{name}.so"
        subprocess.run([*compiler, "-shared", soname, "all.o", "-o", f"lib{name}.so"], check=True, cwd=folder)
