"""What an engine is started with."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from polyradix.cache.radix import EvictionPolicy
from polyradix.schedule.queue import Policy


class ConfigError(ValueError):
    """A launch option that cannot work here; the message names the option, its value and what would work."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """None means: chosen from the model, the backend and the free memory."""

    model: str
    device: str = "auto"
    tp: int = 1  # tensor-parallel ranks the model is split over
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kv_dtype: Literal["auto", "float8_e4m3fn"] = "auto"  # auto: that of activations
    load_format: Literal["auto", "dummy"] = "auto"
    revision: str | None = None  # of a model on the Hub: a branch, tag or commit
    max_context: int | None = None  # tokens of one sequence, prompt and output
    max_seqs: int = 64  # requests running at once
    max_tokens_per_step: int | None = None  # token budget of one step: prefill chunks and decodes together
    mem_fraction: float | None = None  # share of the memory that loading and steps leave, for the KV cache
    kv_pages: int | None = None  # overrides mem_fraction
    page_size: int | None = None  # tokens per KV page
    policy: Policy = "lpm"
    fair: bool = False  # the tenant that got the least service goes first
    chunked_prefill_size: int | None = None  # prefill tokens of one step; what max_tokens_per_step leaves if None
    schedule_conservativeness: float = 1.0  # how fast more pages are left for outputs once they ran out
    max_queued_requests: int | None = None  # beyond these, requests are refused
    request_timeout: float | None = None  # seconds, the most and the default of a request's own
    eviction_policy: EvictionPolicy = "lru"
    radix: bool = True  # reuse prefixes across requests
    jump_forward: bool = True  # append tokens that a grammar forces, instead of sampling them
    embeddings: bool = False  # serve them, at the cost of one [hidden, hidden] weight
    emulate: bool = False
    seed: int = 0  # for requests that bring none, and for dummy weights
    progress: bool = True  # show a bar while loading
    backend_options: dict[str, Any] = {}

    def check(self) -> None:
        """Raises ConfigError for the first value out of range."""
        for name in (
            "tp",
            "max_context",
            "max_seqs",
            "max_tokens_per_step",
            "kv_pages",
            "page_size",
            "chunked_prefill_size",
        ):
            value = getattr(self, name)
            least = 2 if name in ("kv_pages", "max_context") else 1
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; expected an integer >= {least}")
        if self.mem_fraction is not None and not 0 < self.mem_fraction < 1:
            raise ConfigError(f"mem_fraction is {self.mem_fraction}; expected a number between 0 and 1")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests is {self.max_queued_requests}; expected an integer >= 0")
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"request_timeout is {self.request_timeout}; expected a number of seconds above 0")
        if not 0 <= self.schedule_conservativeness < math.inf:
            raise ConfigError(f"schedule_conservativeness is {self.schedule_conservativeness}; expected a number >= 0")
        if self.eviction_policy == "priority" and self.policy != "priority":
            raise ConfigError(f"eviction_policy is 'priority'; expected another with policy {self.policy!r}")
