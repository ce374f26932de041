"""Tensor parallelism over torch.distributed: a Backend of several devices, each driven by a process of its own.

Rank 0 is in the caller's process, so that logits are sampled and fetched as on one device. What it is called for it
tells the others in small messages (followers.py), and every rank does it with an ordinary backend (rank.py). A step
reaches them as a recording. Rank 0's samples that the next batch reads are broadcast on the device: nobody waits for
them, and no rank can sample anything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.protocol import (
    KV,
    Array,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    LogProbs,
    Memory,
    Meta,
    ParamPart,
    Params,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix.backend.quant import check_quant
from polyradix.backend.record import Recorder
from polyradix.backend.shard import check_param, local_kv, shard
from polyradix_torch.host import done
from polyradix_torch.mesh.collectives import Join
from polyradix_torch.mesh.follower import Make, Place
from polyradix_torch.mesh.followers import Followers
from polyradix_torch.mesh.messages import Held


@dataclass(frozen=True)
class Cache:
    """`spec` is the whole model's."""

    held: Held
    spec: KVSpec


class Mesh:
    """`make(rank)`, a function that can be pickled, makes the backend of a rank. Weights and batches are Held, a KV is
    a Cache, and arrays are rank 0's own."""

    def __init__(self, make: Make, join: Join, tp: int) -> None:
        self._others = Followers(lambda path: Place(make, join, tp, path), tp)
        self._end = weakref.finalize(self, self._others.close)
        try:
            self._rank = self._others.start()
        except BaseException:
            self._end()
            raise
        recorder = Recorder(tp)
        self._recorder, self._tp, self._own = recorder, tp, self._rank.backend
        self.ops, self.collectives = recorder.ops, recorder.collectives
        self.caps = replace(self._own.caps, notes=(*self._own.caps.notes, f"tp {tp}, by {join.__name__}"))

    def memory(self) -> Memory:
        return min(self._others.ask(self._rank.memory, "memory"), key=lambda m: m.free)

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        check_quant(spec, self.caps)
        check_param(spec, self._tp)
        parts = {part: read(part) for part in _parts(spec)}

        def shards(rank: int) -> dict[str, HostArray]:
            return {part: shard(spec, x, rank, self._tp, part) for part, x in parts.items()}

        out, own = self._others.hold(), shards(0)
        args = [(spec, window.write(shards(rank))) for rank, window in enumerate(self._others.windows(), 1)]
        packed = self._others.ask_each(
            lambda: self._rank.pack(spec, lambda part="weight": own[part]), "unpack", args, keep=out
        )
        out.own = packed[0]
        return out

    def kv_page_bytes(self, spec: KVSpec) -> int:
        return self._own.kv_page_bytes(local_kv(spec, self._tp))

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        local = local_kv(spec, self._tp)
        for window in self._others.windows():  # the weights have come
            window.clear()
        held = self._others.hold()
        own = partial(self._rank.alloc_kv, local, pages)
        held.own = self._others.ask(own, "alloc_kv", local, pages, keep=held)[0]
        return Cache(held, spec)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta:
        batch.check_prev(prev)
        out, samples = self._others.hold(), 0 if prev is None else len(prev)
        own = partial(self._rank.prepare, batch, samples, prev)
        out.own = self._others.tell(own, "prepare", batch, samples, keep=out)
        return out

    def compile(self, step: Step, limits: Limits) -> Compiled:
        others, rank, taught = self._others, self._rank, self._others.hold()
        taught.own = others.tell(partial(rank.compile, limits), "compile", limits, keep=taught)
        known: tuple[Params, Held] | None = None

        def learn(params: Params) -> Held:
            program = self._recorder.record(step, self.ops, params)
            others.tell(partial(rank.teach, taught.own, program), "teach", taught, program)
            held, whole = others.hold(), (params.top, params.layers)
            mine = [{name: w.own for name, w in each.items()} for each in (params.top, *params.layers)]
            held.own = others.tell(partial(rank.params, mine[0], mine[1:]), "params", *whole, keep=held)
            return held

        def run(params: Params, kv: Cache, meta: Held) -> tuple[Array, KV]:
            nonlocal known
            if known is None or known[0] is not params:
                known = params, learn(params)
            args = taught, known[1], kv.held, meta
            return others.tell(partial(rank.run, *(x.own for x in args)), "run", *args), kv

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return self._own.sample(logits, batch)

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        return self._own.logprobs(logits, tokens, top)

    def copy_pages(self, kv: Cache, src: Sequence[int], dst: Sequence[int]) -> KV:
        args = list(src), list(dst)
        self._others.tell(partial(self._rank.copy_pages, kv.held.own, *args), "copy_pages", kv.held, *args)
        return kv

    def export_pages(self, kv: Cache, pages: Sequence[int]) -> Future[HostArray]:
        pages = list(pages)
        own = partial(self._rank.export_pages, kv.held.own, pages)
        if kv.spec.kind == "latent":  # every rank has all of it
            self._others.check()
            return done(own())
        return done(np.concatenate(self._others.ask(own, "export_pages", kv.held, pages), axis=4))

    def import_pages(self, kv: Cache, pages: Sequence[int], data: HostArray) -> KV:
        pages, heads = list(pages), kv.spec.kv_heads
        if data.ndim != 6 or data.shape[4] != heads:
            raise ValueError(f"imported pages have shape {data.shape}; expected 6 axes, and {heads} heads in the fifth")
        each = [data] * self._tp if kv.spec.kind == "latent" else np.split(data, self._tp, axis=4)
        own = partial(self._rank.import_pages, kv.held.own, pages, each[0])
        self._others.ask_each(own, "import_pages", [(kv.held, pages, part) for part in each[1:]])
        return kv

    def fetch(self, x: Array) -> Future[HostArray]:
        return Watched(self._own.fetch(x), self._others.check)


class Watched(Future[HostArray]):
    """A fetch by rank 0. It fails if the mesh is lost by the time it is done: what was computed then, nobody knows."""

    def __init__(self, fetched: Future[HostArray], check: Callable[[], None]) -> None:
        super().__init__()
        self._fetched, self._check = fetched, check

    def done(self) -> bool:
        return self._fetched.done()

    def result(self, timeout: float | None = None) -> HostArray:
        try:
            return self._fetched.result(timeout)
        finally:
            self._check()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            self.result(timeout)
        except TimeoutError:
            raise
        except Exception as error:
            return error
        return None

    def add_done_callback(self, fn: Callable[[Future[HostArray]], object]) -> None:
        self._fetched.add_done_callback(lambda _: fn(self))


def _parts(spec: ParamSpec) -> list[ParamPart]:
    parts: list[ParamPart] = ["weight"]
    if spec.bias:
        parts.append("bias")
    if spec.quant is not None:
        parts += ["scale", "zero"] if spec.quant.format == "int4" else ["scale"]
    return parts
