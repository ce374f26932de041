"""Batches as the kernels read them, and programs: eager ones of one op, recorded ones of a whole step."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import defaultdict
from math import prod
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import I32, HostBatch
from polyradix.backend.protocol import Limits
from polyradix_cpu.native.lib import ARRAYS, SEQS, Header, Library, Op
from polyradix_cpu.native.params import Tensor


class NativeMeta:
    """A prepared batch of T tokens in S sequences. `prev` int32 [S'] gives the tokens HostBatch.from_prev names."""

    def __init__(self, batch: HostBatch, prev: Tensor | I32 | None = None) -> None:
        self.T, self.S = batch.num_tokens, batch.num_seqs
        tokens = batch.tokens
        if prev is not None:
            samples = np.asarray(prev)
            tokens = np.where(batch.from_prev >= 0, samples[np.maximum(batch.from_prev, 0)], tokens)
        named = {"tokens": tokens} | {name: getattr(batch, name) for name in ARRAYS[1:]}
        if batch.others:
            named |= {name: np.stack([getattr(t, name) for t in (batch, *batch.others)]) for name in ("slots", "pages")}
        self._arrays = {name: np.ascontiguousarray(x, np.int32) for name, x in named.items()}
        self.header = Header(T=self.T, S=self.S, page_stride=batch.pages.shape[1])
        for name, x in self._arrays.items():
            setattr(self.header, name, x.ctypes.data)


class Capacity:
    """Stands for a batch while a step is recorded: the largest T and S."""

    def __init__(self, limits: Limits) -> None:
        self.T, self.S = limits.max_tokens, limits.max_seqs


class Eager:
    """Runs each op at once."""

    def __init__(self, library: Library) -> None:
        self._run = library.run

    def empty(self, shape: tuple[int, ...], dtype: Any, seqs: bool) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def is_seqs(self, x: Tensor) -> bool:
        return False

    def emit(self, op: Op, rows: int, m: NativeMeta | None, threads: int) -> None:
        header = m.header if m is not None else Header(T=rows, S=rows)
        header.threads = threads
        self._run(ctypes.byref(op), 1, ctypes.byref(header))


class Recorder:
    """Collects ops. Buffers hold the largest batch; one is reused when the last tensor or view over it is gone."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._seqs: dict[int, bool] = {}
        self.buffers: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: Any, seqs: bool) -> Tensor:
        size = -(-prod(shape) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        if not self._free[size]:
            self.buffers.append(mmap.mmap(-1, size))
            self._free[size].append(self.buffers[-1])
        buffer = self._free[size].pop()
        owner = (ctypes.c_char * size).from_buffer(buffer)
        weakref.finalize(owner, self._free[size].append, buffer)
        x = torch.frombuffer(owner, dtype=dtype, count=prod(shape)).view(shape)
        self._seqs[x.data_ptr()] = seqs
        return x

    def is_seqs(self, x: Tensor) -> bool:
        return self._seqs.get(x.untyped_storage().data_ptr(), False)

    def emit(self, op: Op, rows: int, m: NativeMeta | None, threads: int) -> None:
        self.ops.append(op)


class Program:
    """A recorded step: `run` gives logits [S,V], valid until the run after the next."""

    def __init__(self, library: Library, recorder: Recorder, logits: Tensor) -> None:
        self._library, self._recorder = library, recorder
        self._ops = (Op * len(recorder.ops))(*recorder.ops)
        final = self._ops[len(recorder.ops) - 1]
        self._slot = next((i for i in range(6) if final.p[i] == logits.data_ptr()), None)
        if self._slot is None or not final.flags & SEQS:
            raise ValueError("the step returned something other than the result of its last verb, logits")
        self._final, self._outputs = final, [logits, torch.empty_like(logits)]

    def run(self, m: NativeMeta, threads: int) -> Tensor:
        self._outputs.reverse()
        self._final.p[self._slot] = self._outputs[0].data_ptr()
        m.header.threads = threads
        self._library.run(self._ops, len(self._ops), ctypes.byref(m.header))
        return self._outputs[0][: m.S]
