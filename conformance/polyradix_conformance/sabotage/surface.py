"""Backends that claim, answer or look like something else than they are."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps, Packed
from polyradix.backend.protocol import KV, Array, AttnSpec, HostArray, KVSpec, Memory, ParamSpec, Reader
from polyradix_conformance.sabotage import sabotage
from polyradix_conformance.sabotage.attention import changed


class Claiming(NumpyBackend):
    """The NumPy backend with other claims."""

    claims: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.caps = replace(self.caps, **self.claims)


@sabotage("L1/attend/whole/window")
class ClaimsTooMuch(NumpyOps):
    """Windows are claimed and declined."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        if a.window is not None:
            raise Unsupported("window")
        return super().attend(q, k, v, kv, m, a)


@sabotage("L1/attend/page-128")
class ClaimsPages(NumpyOps):
    """Pages of 128 tokens are claimed, and only 64 slots of them used."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        if kv[0].shape[1] == 128:
            m = changed(m, slots=m.batch.slots // 128 * 128 + m.batch.slots % 64)
        return super().attend(q, k, v, kv, m, a)


@sabotage("L1/attend/dim-256")
class ClaimsHeadDim(NumpyBackend):
    """Heads of 1024 are claimed, and those over 128 declined."""

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        if spec.head_dim > 128:
            raise Unsupported("head_dim")
        return super().alloc_kv(spec, pages)


@sabotage("L1/attend/whole/softcap")
class ClaimsTooLittle(Claiming):
    """A softcap is answered though not claimed."""

    claims: ClassVar = {"features": frozenset({"window", "bias", "qk_norm", "mask", "logprobs"})}


@sabotage("L0/capabilities")
class ClaimsNothing(Claiming):
    """No dtype is claimed, so that every case could be declined."""

    claims: ClassVar = {"dtypes": frozenset()}

    def pack(self, spec: ParamSpec, read: Reader) -> Packed:
        raise Unsupported("everything")


@sabotage("L0/capabilities")
class ClaimsUnknown(Claiming):
    """A feature is claimed that no contract has."""

    claims: ClassVar = {"features": frozenset({"bias", "teleport"})}


@sabotage("L0/declined")
class DeclinesNothing(NumpyBackend):
    """A cache of any shape is made, claimed or not."""

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        claimed, self.caps = self.caps, replace(self.caps, max_head_dim=10**6, page_sizes=(spec.page_size,))
        try:
            return super().alloc_kv(spec, pages)
        finally:
            self.caps = claimed


@sabotage("L1/logits")
class Zeros(NumpyOps):
    """Logits are zeros."""

    def logits(self, x: Any, w: Packed, softcap: float | None = None) -> Any:
        return 0 * super().logits(x, w, softcap)


@sabotage("L0/memory")
class MemoryLies(NumpyBackend):
    """More memory is free than there is."""

    def memory(self) -> Memory:
        total = super().memory().total
        return Memory(free=2 * total, total=total)


@sabotage("L0/page_bytes")
class PageBytesShort(NumpyBackend):
    """The bytes of a page are those of its keys."""

    def kv_page_bytes(self, spec: KVSpec) -> int:
        return super().kv_page_bytes(spec) // 2


@sabotage("L0/methods")
class VerbMissing(NumpyOps):
    """There is no fused gate."""

    linear_gated: Any = None


@sabotage("L0/methods")
class VerbUnknown(NumpyOps):
    """There is a verb that no contract has."""

    def fused_block(self, x: Any) -> Any:
        return x


@sabotage("L0/methods")
class ParameterRequired(NumpyBackend):
    """`prepare` wants the previous samples even where there are none."""

    def prepare(self, batch: HostBatch, prev: Array | None) -> NumpyMeta:  # type: ignore[override]
        return super().prepare(batch, prev)


@sabotage("L0/results")
class LogitsWide(NumpyOps):
    """Logits are float64."""

    def logits(self, x: Any, w: Packed, softcap: float | None = None) -> Any:
        return super().logits(x, w, softcap).astype(np.float64)


@sabotage("L0/results")
class SamplesWide(NumpyBackend):
    """Samples are int64."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, batch).astype(np.int64)


@sabotage("L2/fetched_later")
class FetchBorrows(NumpyBackend):
    """A fetch gives a view that the next one overwrites."""

    _buffer = np.zeros(0, np.uint8)

    def fetch(self, x: Array) -> Future[HostArray]:
        if x.nbytes > self._buffer.nbytes:
            self._buffer = np.zeros(x.nbytes, np.uint8)
        view = self._buffer[: x.nbytes].view(x.dtype).reshape(x.shape)
        view[:] = x
        return self._launch.future(lambda: view)
