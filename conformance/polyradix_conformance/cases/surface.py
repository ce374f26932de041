"""L0: the surface. What is claimed is well formed, and what no contract has is declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyradix.backend.capabilities import FEATURES, KV_FP8, KV_GROUPS, QUANTS, Unsupported
from polyradix.backend.protocol import Heads, HostArray, KVSpec, Memory, ParamPart, ParamSpec
from polyradix.backend.registry import check_drift
from polyradix_conformance.cases import case
from polyradix_conformance.cases.sampling import VOCAB, Sampler, greedy_batch
from polyradix_conformance.oracle import HOST
from polyradix_conformance.rig import Mismatch, Rig


def methods(rig: Rig) -> None:
    check_drift(rig.backend.caps.name, rig.backend)


def capabilities(rig: Rig) -> None:
    caps, known = rig.backend.caps, FEATURES | QUANTS | {KV_FP8[0], KV_GROUPS}
    rules = (
        ("dtypes", caps.dtypes, bool(caps.dtypes) and caps.dtypes <= set(HOST), f"some of {sorted(HOST)}"),
        ("page_sizes", caps.page_sizes, bool(caps.page_sizes) and min(caps.page_sizes) > 0, "positive sizes"),
        ("max_head_dim", caps.max_head_dim, caps.max_head_dim >= 64, "at least 64"),
        ("head_dim_multiple", caps.head_dim_multiple, 64 % caps.head_dim_multiple == 0, "a divisor of 64"),
        ("features", caps.features, caps.features <= known, f"some of {sorted(known)}"),
        ("step_tokens", caps.step_tokens, caps.step_tokens > 0, "a positive count"),
    )
    for name, value, good, expected in rules:
        if not good:
            raise Mismatch(f"caps.{name} is {value}; expected {expected}")


def memory(rig: Rig) -> None:
    got = rig.backend.memory()
    if not (isinstance(got, Memory) and 0 < got.free <= got.total):
        raise Mismatch(f"memory is {got}; expected 0 < free <= total")


def page_bytes(rig: Rig) -> None:
    """At least what the values take."""
    size = np.dtype(HOST[rig.dtype]).itemsize
    for layers, heads, dim in ((1, 1, 64), (30, 3, 64)):
        got = rig.backend.kv_page_bytes(KVSpec(layers, heads, dim, rig.page, rig.dtype))
        least = 2 * layers * heads * dim * rig.page * size
        if got < least:
            raise Mismatch(f"kv_page_bytes of {layers} layers is {got}; expected at least {least}")


def results(rig: Rig) -> None:
    """Logits are float32 [S,V] and samples int32 [S], without padding; exports are of the cache's dtype."""
    logits = Sampler(rig).logits([0, 1, 2])
    samples = rig.backend.sample(logits, greedy_batch(3))
    for name, x, dtype, shape in (("logits", logits, "float32", (3, VOCAB)), ("samples", samples, "int32", (3,))):
        got = rig.backend.fetch(x).result(timeout=60)
        if (got.dtype, got.shape) != (np.dtype(dtype), shape):
            raise Mismatch(f"fetched {name} are {got.dtype} {got.shape}; expected {dtype} {shape}")
    spec, kv = rig.kv(4, Heads(4, 2, 64), 3)
    exported, form = rig.export(kv, [2, 3]), (2, 3, 2, spec.page_size, 2, 64)
    if (exported.dtype, exported.shape) != (np.dtype(HOST[rig.dtype]), form):
        raise Mismatch(f"exported pages are {exported.dtype} {exported.shape}; expected {rig.dtype} {form}")


def declined(rig: Rig) -> None:
    """What no capability offers raises Unsupported."""

    def ones(part: ParamPart = "weight") -> HostArray:
        return np.ones((64, 64), np.float16)

    half: Any = "float16"
    huge = max(rig.backend.caps.page_sizes) * 2 + 1
    dim = rig.backend.caps.max_head_dim + rig.backend.caps.head_dim_multiple
    attempts: dict[str, Callable[[], Any]] = {
        "a float16 parameter": lambda: rig.backend.pack(ParamSpec("w", "linear", (64, 64), half), ones),
        f"pages of {huge} tokens": lambda: rig.backend.alloc_kv(KVSpec(1, 1, 64, huge, rig.dtype), 2),
        f"heads of size {dim}": lambda: rig.backend.alloc_kv(KVSpec(1, 1, dim, rig.page, rig.dtype), 2),
        "a float16 cache": lambda: rig.backend.alloc_kv(KVSpec(1, 1, 64, rig.page, half), 2),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except Unsupported:
            continue
        raise Mismatch(f"{what} was accepted; expected Unsupported")


for dtype in ("float32", "bfloat16"):
    for body in (methods, capabilities, memory, page_bytes, results, declined):
        case(f"L0/{body.__name__}", dtype, body)
