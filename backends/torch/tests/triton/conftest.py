"""Triton kernels on the CPU. A process of their own: the interpreter is chosen when triton is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already, without its interpreter: run this folder in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from exact_interpreter import install


@pytest.fixture
def exact():
    """The interpreter as exact_interpreter.py patches it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield
