"""Polyradix: one LLM server core for any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyradix.engine.offline import Engine as Engine

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Engine":  # imported on first use: `import polyradix` stays light
        from polyradix.engine.offline import Engine

        return Engine
    raise AttributeError(f"module 'polyradix' has no attribute {name!r}")
