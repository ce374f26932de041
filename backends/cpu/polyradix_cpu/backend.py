"""The two CPU backends, on our own native kernels and on upstream torch alone, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import torch

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, KV_GROUPS, Capabilities, Unsupported, check_claimed
from polyradix.backend.protocol import (
    KV,
    Array,
    Backend,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    Memory,
    Meta,
    Ops,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix.backend.quant import check_quant
from polyradix_cpu import host, ipex, native
from polyradix_cpu.linear import PackedLinear, native_bf16
from polyradix_torch import TorchBackend, TorchOps, done, to_numpy, torch_dtype
from polyradix_torch.sample import adjusted

PAGE_SIZES = (16, 32, 64, 128)
STEP_TOKENS = 512  # products are at their full speed from about 100 rows; more would only keep decodes waiting


class TorchCPUBackend(TorchBackend):
    """Upstream torch alone: oneDNN's packed linears and tiled attention. Runs wherever torch does."""

    def __init__(self, attention: str) -> None:
        self._bf16 = torch.bfloat16 if native_bf16() else torch.float32
        own = attention == "own"
        notes = [f"kernels: torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"]
        if self._bf16 == torch.float32:
            notes.append("bfloat16 weights are kept as float32: this processor does not multiply bfloat16 itself")
        if not own:
            notes.append("attention: intel_extension_for_pytorch, archived; a prefix hit is not bit-exact with a miss")
        features = FEATURES | {"kv_fp8", KV_GROUPS} if own else FEATURES - {"sinks"}
        caps = _capabilities(notes, PAGE_SIZES if own else PAGE_SIZES[:1], 512, 2, own, features)
        super().__init__(caps, TorchOps() if own else TorchOps(ipex.IpexAttention(ipex.load()), invariant=False), "cpu")

    def memory(self) -> Memory:
        return host.memory()

    def _linear(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        narrow = spec.dtype == "bfloat16" and spec.kind != "logits"  # logits are float32: rounding them would make ties
        return PackedLinear(weight, bias, self._bf16 if narrow else torch.float32)


class NativeBackend(TorchBackend):
    """Our own kernels: a whole step is one call into the library. Weights and KV are in its layouts, in huge pages."""

    def __init__(self, library: native.Library) -> None:
        self._native = native.NativeOps(library)
        verbs = {name: getattr(self._native, name) for name in vars(Ops) if not name.startswith("_")}
        features = FEATURES - {"indexer"} | {KV_GROUPS}
        caps = _capabilities([f"kernels: native ({library.isa})"], PAGE_SIZES, 256, 16, True, features)
        super().__init__(caps, cast(Ops, SimpleNamespace(**verbs)), "cpu")

    def memory(self) -> Memory:
        return host.memory()

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        torch_dtype(spec.dtype)
        check_quant(spec, self.caps)
        return native.pack(spec, read)

    def kv_page_bytes(self, spec: KVSpec) -> int:
        return native.kv_page_bytes(spec)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        check_claimed(spec, self.caps)
        return native.alloc_kv(spec, pages)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta:
        batch.check_prev(prev)
        return native.NativeMeta(batch, prev)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        return self._native.compile(step, limits)

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        logits = adjusted(logits, batch)
        if batch.greedy and batch.mask is None:
            return self._native.argmax(logits)
        return self._native.sample(logits, batch)

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return native.copy_pages(kv, src, dst)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return done(native.export_pages(kv, pages))

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        return native.import_pages(kv, pages, data)

    def fetch(self, x: Array) -> Future[HostArray]:
        return done(to_numpy(x).copy())  # a copy, as the library writes logits into the same buffers again


def create(kernels: str, attention: str, threads: int | None) -> Backend:
    """See Entry.create; the values are checked there."""
    if threads is not None:
        torch.set_num_threads(threads)
    if attention == "ipex" and kernels == "native":
        raise ValueError("attention is 'ipex' with kernels 'native'; expected kernels 'torch' or 'auto'")
    library: Any = None if kernels == "torch" or attention == "ipex" else native.load()
    if library is not None:
        return NativeBackend(library)
    if kernels == "native":
        raise Unsupported("kernels 'native'", "no library for this processor is built; see backends/cpu/setup.py")
    return TorchCPUBackend(attention)


def _capabilities(
    notes: list[str],
    page_sizes: tuple[int, ...],
    max_head_dim: int,
    multiple: int,
    invariant: bool,
    features: frozenset[str],
) -> Capabilities:
    name, sets = host.processor()
    return Capabilities(
        name="cpu",
        device=f"{name} ({', '.join(sets) or 'generic'}, {torch.get_num_threads()} threads)",
        dtypes=frozenset({"float32", "bfloat16"}),
        page_sizes=page_sizes,
        max_head_dim=max_head_dim,
        head_dim_multiple=multiple,
        features=features,
        step_tokens=STEP_TOKENS,
        batch_invariant=invariant,
        notes=tuple(notes),
    )
