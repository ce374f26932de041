"""What tests of several distributions share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def demo_reference() -> Any:
    """The demo model in transformers, float32, by transformers' own reader of the file, which takes 15 seconds."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from polyradix.graph.checkpoint import fetch_demo

    path = fetch_demo()
    found = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return found.eval()
