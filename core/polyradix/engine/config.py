"""What an engine is started with."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ConfigError(ValueError):
    """A launch option that cannot work here; the message names the option, its value and what would work."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """None means: chosen from the model, the backend and the free memory."""

    model: str
    device: str = "auto"
    tp: int = 1  # tensor-parallel ranks the model is split over
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_context: int | None = None  # tokens of one sequence, prompt and output
    max_seqs: int = 64  # requests running at once
    max_tokens_per_step: int | None = None  # token budget of one step: prefill chunks and decodes together
    mem_fraction: float | None = None  # share of the memory that loading and steps leave, for the KV cache
    kv_pages: int | None = None  # overrides mem_fraction
    page_size: int | None = None  # tokens per KV page
    policy: Literal["lpm", "fcfs"] = "lpm"
    radix: bool = True  # reuse prefixes across requests
    embeddings: bool = False  # serve them, at the cost of one [hidden, hidden] weight
    emulate: bool = False
    seed: int = 0  # for requests that bring none, and for dummy weights
    progress: bool = True  # show a bar while loading
    backend_options: dict[str, Any] = {}

    def check(self) -> None:
        """Raises ConfigError for the first value out of range."""
        for name in ("tp", "max_context", "max_seqs", "max_tokens_per_step", "kv_pages", "page_size"):
            value = getattr(self, name)
            least = 2 if name in ("kv_pages", "max_context") else 1
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if self.mem_fraction is not None and not 0 < self.mem_fraction < 1:
            raise ConfigError(f"mem_fraction is {self.mem_fraction}; expected a number between 0 and 1")
