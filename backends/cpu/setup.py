"""Builds the kernel libraries, one per instruction set, with the machine's C++ compiler.

Without a compiler (or on another processor) it says so and installs without them; the backend then uses torch alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
LANGUAGE = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-fvisibility=hidden"]
MATHS = ["-fno-math-errno", "-ffp-contract=off"]  # contraction would make a result depend on inlining
WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12's headers trip these two
COMMON = [*LANGUAGE, *MATHS, *WARNINGS]
AVX512 = ["-DPX_AVX512=1", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
TARGETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "amx": [*AVX512, "-DPX_AMX=1", "-mamx-tile", "-mamx-bf16"],
}


def build_native(folder: Path) -> list[Path]:
    """Compiles every library it can into `folder`; returns those made."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        print("polyradix-cpu: no C++ compiler for x86-64 Linux; installing without native kernels", file=sys.stderr)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    sources = b"".join(path.read_bytes() for path in sorted((HERE / "csrc").glob("*.[ch]*")))
    (folder / "px.sha256").write_text(hashlib.sha256(sources).hexdigest())  # native/lib.py compares it
    made = []
    for isa, flags in TARGETS.items():
        out = folder / f"px_{isa}.so"
        out.unlink(missing_ok=True)  # a failed build must not leave an old one in use
        command = [compiler, *COMMON, *flags, str(HERE / "csrc" / "program.cpp"), "-o", str(out)]
        if subprocess.run(command).returncode == 0:
            made.append(out)
        else:
            print(f"polyradix-cpu: the {isa} kernels did not compile; installing without them", file=sys.stderr)
    return made


class BuildPy(build_py):
    """build_py, plus the libraries beside the Python files (in the source tree for an editable install)."""

    def run(self) -> None:
        super().run()
        base = HERE if self.editable_mode else Path(self.build_lib)
        self.native = build_native(base / "polyradix_cpu" / "native")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, getattr(self, "native", []))]


class BdistWheel(bdist_wheel):
    """One wheel for every Python and torch version, but of this platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
