"""Triton's interpreter, made exact. Its own process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already, without its interpreter: run this folder in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3] / "torch/tests/triton"))

import pytest
from exact_interpreter import install


@pytest.fixture
def exact():
    """The interpreter as exact_interpreter.py patches it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield
