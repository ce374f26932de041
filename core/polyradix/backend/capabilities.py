"""What a backend can do, as one frozen value that the engine reads, conformance checks and `check` explains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyradix.backend.protocol import KVSpec


class Unsupported(NotImplementedError):
    """Raised by a backend for a feature it does not claim. `feature` is a name from Capabilities.features or a verb."""

    def __init__(self, feature: str, detail: str = "") -> None:
        super().__init__(f"unsupported: {feature}" + (f" ({detail})" if detail else ""))
        self.feature = feature


class DeviceLost(RuntimeError):
    """Raised by a backend whose device can do nothing more: the engine ends. Any other error ends the requests of its
    step and no others; one for want of memory is a MemoryError."""


FEATURES = frozenset(
    {"window", "softcap", "sinks", "bias", "qk_norm", "gelu_tanh", "mask", "adjust", "logprobs"}
    | {"moe", "moe_bias", "moe_clamp", "mla", "indexer"}
)
KV_FP8 = "kv_fp8", "kv_fp8 of latent rows"  # features of a cache, see KVSpec; the latter is nobody's yet
KV_GROUPS = "kv_groups"  # a cache in groups, see KVSpec; no model needs it, and without it none gives pages back
QUANTS = frozenset({"quant_fp8", "quant_int4"})  # features, too: weights kept as Quant says; nothing needs them


@dataclass(frozen=True)
class Capabilities:
    """A backend's claims."""

    name: str
    device: str  # what a person would call it, for example the processor's name
    dtypes: frozenset[str]  # of weights, activations and KV
    page_sizes: tuple[int, ...]  # supported, best first
    max_head_dim: int
    head_dim_multiple: int = 1
    features: frozenset[str] = field(default_factory=frozenset)
    batch_invariant: bool = False  # a token's bits do not depend on its batch: prefix hit = miss, bit for bit
    step_tokens: int = 2048  # tokens in one step that keep the device busy: the default token budget
    async_launch: bool = False  # a launch returns before the work is done, so overlapping two steps pays
    mem_fraction: float = 0.4  # of the free memory: what the KV cache takes if nobody says
    decode_sizes: tuple[int, ...] = ()  # sequences that decodes are padded to: before it is ready, the engine runs the
    # largest step, after which `memory` must leave room for another, and one decode of each size
    max_tp: int = 1  # tensor-parallel ranks that one model may be split over here
    emulated: bool = False
    notes: tuple[str, ...] = ()  # facts worth a line in the log, for example which kernels were chosen


@dataclass(frozen=True)
class Needs:
    """What a model asks of a backend; made from its spec by the graph."""

    dtype: str
    head_dim: int  # of `attend`; 0 for a model that has none
    features: frozenset[str]
    tp: int = 1


@dataclass(frozen=True)
class Reason:
    """One thing that stands in the way: what was needed, and what the backend offers."""

    need: str
    offer: str

    def __str__(self) -> str:
        return f"needs {self.need}; the backend offers {self.offer}"


def validate(needs: Needs, caps: Capabilities, page_size: int | None = None) -> list[Reason]:
    """Why `caps` cannot serve a model; empty when it can. Reads no weights."""
    out: list[Reason] = []
    if needs.dtype not in caps.dtypes:
        out.append(Reason(f"dtype {needs.dtype}", _join(caps.dtypes)))
    if needs.head_dim > caps.max_head_dim or needs.head_dim % caps.head_dim_multiple:
        out.append(
            Reason(f"head_dim {needs.head_dim}", f"multiples of {caps.head_dim_multiple} up to {caps.max_head_dim}")
        )
    out += [Reason(f"feature {f}", _join(caps.features)) for f in sorted(needs.features - caps.features)]
    if needs.tp > caps.max_tp:
        out.append(Reason(f"tp {needs.tp}", f"at most {caps.max_tp}"))
    if page_size is not None and page_size not in caps.page_sizes:
        out.append(Reason(f"page size {page_size}", _join(map(str, caps.page_sizes))))
    return out


def check_claimed(spec: KVSpec, caps: Capabilities) -> None:
    """Raises Unsupported for a cache that `caps` does not claim."""
    latent, narrow = spec.kind == "latent", spec.dtype == "float8_e4m3fn"
    wanted = ("mla", latent), ("indexer", spec.index), (KV_FP8[latent], narrow), (KV_GROUPS, spec.groups)
    features = frozenset(name for name, on in wanted if on)
    needs = Needs(min(caps.dtypes) if narrow else spec.dtype, 0 if latent else spec.head_dim, features)
    reasons = validate(needs, caps, spec.page_size)
    if reasons:
        raise Unsupported("KV", "; ".join(map(str, reasons)))


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
