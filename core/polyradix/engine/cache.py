"""The cache of a model on a backend: one table of pages for all layers, or groups where that spares memory."""

from __future__ import annotations

from polyradix.backend.capabilities import KV_GROUPS, Capabilities
from polyradix.backend.protocol import KVDType, KVSpec
from polyradix.cache.blocks import Groups
from polyradix.graph.spec import ModelSpec
from polyradix.graph.windows import layer_groups


def cache_of(
    spec: ModelSpec, caps: Capabilities, page_size: int, dtype: KVDType, context: int
) -> tuple[KVSpec, Groups]:
    """What the backend allocates, and how many groups of a block keep its pages, for sequences of up to `context`."""
    useful = KV_GROUPS in caps.features and spec.window is not None and 1 < spec.window < context
    layers = layer_groups(spec.layers, spec.windowed) if useful else ()
    kv = spec.kv_spec(page_size, dtype, layers)
    windowed = sum(group[0] in spec.windowed for group in layers)
    return kv, Groups(len(layers) - windowed, windowed, spec.window or 1) if layers else Groups()
