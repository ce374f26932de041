"""Tensor parallelism in NumPy: ranks are threads of this process, and each runs the whole step over its own shards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import Arr, Packed
from polyradix.backend.protocol import (
    KV,
    Array,
    Compiled,
    KVSpec,
    Limits,
    Memory,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
)
from polyradix.backend.shard import check_param, local_kv, shard

T = TypeVar("T")


class Ranks:
    """One thread a rank, and a place to meet. `run` starts a step on all of them; the rest is for use inside it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, "polyradix-rank")
        self._barrier = threading.Barrier(size)
        self._posted: list[tuple[str, Any]] = [("", None)] * size
        self._thread = threading.local()

    @property
    def rank(self) -> int:
        """The rank of the calling thread. Raises RuntimeError outside of a step."""
        rank: int | None = getattr(self._thread, "rank", None)
        if rank is None:
            raise RuntimeError("collectives are for use inside a step")
        return rank

    def run(self, fn: Callable[[int], T]) -> list[T]:
        """fn(rank) on all ranks at once. If one raises, the others stop where they next meet; its error comes out."""
        self._barrier.reset()
        futures = [self._pool.submit(self._as_rank, rank, fn) for rank in range(self.size)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))
        return [f.result() for f in futures]

    def meet(self, what: str, x: Any) -> list[Any]:
        """The x of every rank, in rank order, once all are here. Raises if they did not come for the same thing."""
        self._posted[self.rank] = what, x
        self._barrier.wait()
        posted = list(self._posted)
        self._barrier.wait()  # nobody posts again before all have read
        if len({what for what, _ in posted}) > 1:
            raise RuntimeError("ranks disagree: " + "; ".join(f"{r}: {what}" for r, (what, _) in enumerate(posted)))
        return [x for _, x in posted]

    def _as_rank(self, rank: int, fn: Callable[[int], T]) -> T:
        self._thread.rank = rank
        try:
            out = fn(rank)
            self.meet("end of the step", None)
            return out
        except BaseException:
            self._barrier.abort()
            raise


class NumpyCollectives:
    """Collectives between Ranks. Every rank takes sums in rank order, so all get the same bits."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.size = ranks, ranks.size

    def all_reduce(self, x: Arr) -> Arr:
        return self._sum(self._exchange("all_reduce", x))

    def all_gather(self, x: Arr, axis: int) -> Arr:
        return np.concatenate(self._exchange(f"all_gather {axis}", x), axis)

    def reduce_scatter(self, x: Arr, axis: int) -> Arr:
        return self._part(self._sum(self._exchange(f"reduce_scatter {axis}", x)), axis)

    def all_to_all(self, x: Arr, axis: int) -> Arr:
        return np.concatenate([self._part(y, axis) for y in self._exchange(f"all_to_all {axis}", x)], axis)

    def broadcast(self, x: Arr, root: int) -> Arr:
        return self._exchange(f"broadcast {root}", x)[root]

    def permute(self, x: Arr, to: Sequence[int]) -> Arr:
        if sorted(to) != list(range(self.size)):
            raise ValueError(f"permute to {list(to)}; expected each rank from 0 to {self.size - 1} once")
        return self._exchange(f"permute {list(to)}", x)[list(to).index(self.ranks.rank)]

    def barrier(self) -> None:
        self.ranks.meet("barrier", None)

    def _exchange(self, verb: str, x: Arr) -> list[Arr]:
        return self.ranks.meet(f"{verb} of {x.dtype} {x.shape}", x)

    def _sum(self, xs: list[Arr]) -> Arr:
        """In float32 at least, rounded once."""
        total = xs[0].astype(np.result_type(xs[0], np.float32))
        for x in xs[1:]:
            total = total + x
        return total.astype(xs[0].dtype)

    def _part(self, x: Arr, axis: int) -> Arr:
        """This rank's of `size` equal parts."""
        return np.split(x, self.size, axis)[self.ranks.rank]


class NumpyMesh(NumpyBackend):
    """A NumpyBackend over `tp` ranks. Weights, KV and the Params of a step are lists with one entry per rank."""

    def __init__(self, compute: Literal["float32", "float64"], async_launch: bool, tp: int) -> None:
        self.ranks = Ranks(tp)
        super().__init__(compute, async_launch, NumpyCollectives(self.ranks))

    def memory(self) -> Memory:
        """The ranks share one machine."""
        whole, tp = super().memory(), self.ranks.size
        return Memory(whole.free // tp, whole.total // tp)

    def pack(self, spec: ParamSpec, read: Reader) -> Any:
        check_param(spec, self.ranks.size)
        whole: Packed = super().pack(spec, read)
        return [self._shard(whole, rank) for rank in range(self.ranks.size)]

    def kv_page_bytes(self, spec: KVSpec) -> int:
        return super().kv_page_bytes(local_kv(spec, self.ranks.size))

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        local = local_kv(spec, self.ranks.size)
        return [NumpyBackend.alloc_kv(self, local, pages) for _ in range(self.ranks.size)]

    def compile(self, step: Step, limits: Limits) -> Compiled:
        return super().compile(partial(self._on_all_ranks, step), limits)

    def _on_all_ranks(self, step: Step, ops: Ops, params: Params, kv: KV, m: Any) -> tuple[Array, KV]:
        """Logits are finished values, so any rank's will do."""
        results = self.ranks.run(lambda rank: step(ops, self._params(params, rank), kv[rank], m))
        return results[0][0], [new for _, new in results]

    def _shard(self, whole: Packed, rank: int) -> Packed:
        spec, tp = whole.spec, self.ranks.size
        bias = None if whole.bias is None else shard(spec, whole.bias, rank, tp, "bias")
        value = np.ascontiguousarray(shard(spec, whole.value, rank, tp))
        return Packed(spec, value, bias, first=rank * len(value))

    def _params(self, params: Params, rank: int) -> Params:
        layers = [{name: w[rank] for name, w in layer.items()} for layer in params.layers]
        return Params({name: w[rank] for name, w in params.top.items()}, layers)

    def _copy(self, kv: Any, src: list[int], dst: list[int]) -> Any:
        return [NumpyBackend._copy(self, own, src, dst) for own in kv]

    def _export(self, kv: Any, pages: list[int]) -> Arr:
        each = [NumpyBackend._export(self, own, pages) for own in kv]
        return each[0] if _latent(kv) else np.concatenate(each, axis=4)

    def _shape(self, kv: Any, pages: int) -> tuple[int, ...]:
        *front, heads, dim = super()._shape(kv[0], pages)
        return (*front, heads if _latent(kv) else heads * self.ranks.size, dim)

    def _write(self, kv: Any, pages: list[int], data: Arr) -> Any:
        size = self.ranks.size
        parts = [data] * size if _latent(kv) else np.split(data, size, axis=4)
        return [NumpyBackend._write(self, own, pages, part) for own, part in zip(kv, parts, strict=True)]


def _latent(kv: Any) -> bool:
    """Whether every rank of a cache holds all of it."""
    return len(kv[0][0]) == 1
