"""Decode steps captured as graphs, one for each of a few sizes. Attention takes the lengths of sequences from the host:
they are given to the graph before each replay, once the replay before has ended, as its tasks hold one set of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Array, Limits, Ops, Params, Step
from polyradix_torch.ops import TorchMeta

FIELDS = ("tokens", "positions", "slots", "from_prev")


def sizes(most: int) -> tuple[int, ...]:
    """Numbers of sequences that graphs are made for: powers of two, and `most`. A graph takes streams of a device that
    has few."""
    return (*(2**i for i in range((most - 1).bit_length())), most)


class StaticBatch:
    """What every graph reads: FIELDS and the pages of limits.max_seqs sequences, int32, in one buffer."""

    def __init__(self, limits: Limits, page: int, device: str) -> None:
        self.limits, self.page, self.sizes = limits, page, sizes(limits.max_seqs)
        most, wide = limits.max_seqs, -(-limits.max_context // page)
        self.buffer = torch.zeros(most * (len(FIELDS) + wide), dtype=torch.int32, device=device)
        self.fields = dict(zip(FIELDS, self.buffer[: len(FIELDS) * most].view(len(FIELDS), most), strict=True))
        self.pages = self.buffer[len(FIELDS) * most :].view(most, wide)

    def load(self, batch: HostBatch) -> Decode:
        """One copy. Rows beyond the batch decode position 0 of scratch page 0."""
        n, most = batch.num_seqs, self.limits.max_seqs
        rows = np.zeros((len(FIELDS), most), np.int32)
        rows[-1] = -1
        pages = np.zeros(self.pages.shape, np.int32)
        for row, name in zip(rows, FIELDS, strict=True):
            row[:n] = getattr(batch, name)
        pages[:n, : batch.pages.shape[1]] = batch.pages
        host = np.concatenate([rows.ravel(), pages.ravel()])
        self.buffer.copy_(torch.from_numpy(host), non_blocking=False)
        size = next(size for size in self.sizes if size >= n)
        return Decode(self, n, batch.kv_len.tolist() + [1] * (size - n))

    def meta(self, size: int) -> TorchMeta:
        """The first `size` rows, with lengths that fit any cache."""
        f = {name: x[:size] for name, x in self.fields.items()}
        last = torch.arange(size, dtype=torch.int32).to(self.buffer.device)
        rows, lengths = list(range(size + 1)), [1] * size
        return TorchMeta(f["tokens"], f["positions"], f["slots"], last, self.pages[:size], rows, lengths)


@dataclass(frozen=True)
class Decode:
    """A batch that was loaded for a graph; `kv_len` has a length for each of the graph's rows."""

    static: StaticBatch
    seqs: int
    kv_len: list[int]


class Graphs:
    """One step's graphs over one set of parameters, cache and static batch; captured anew when these change."""

    def __init__(self, step: Step, ops: Ops) -> None:
        self._step, self._ops = step, ops
        self._bound: tuple[Any, ...] = ()
        self._made: dict[int, tuple[Any, Array, TorchMeta]] = {}
        self._pool: Any = None

    def __call__(self, params: Params, kv: Any, batch: Decode) -> Array:
        """Logits [seqs,V]; valid until the next call."""
        bound = params, kv, batch.static
        if not self._bound or any(a is not b for a, b in zip(self._bound, bound, strict=True)):
            self._bound, self._made, self._pool = bound, {}, None
        size = len(batch.kv_len)
        if size not in self._made:
            self._made[size] = self._capture(params, kv, batch.static, size)
        graph, logits, _ = self._made[size]
        torch.npu.current_stream().synchronize()
        graph.update(cpu_update_input=[{"actual_seq_kvlen": batch.kv_len}])
        graph.replay()
        return logits[: batch.seqs]

    def _capture(self, params: Params, kv: Any, static: StaticBatch, size: int) -> tuple[Any, Array, TorchMeta]:
        self._step(
            self._ops, params, kv, static.meta(size)
        )  # compiles what is not yet; the replay writes the same rows
        meta = static.meta(size)  # lives as long as the graph, which reads its tensors
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        # other threads, which watch collectives, may use the device meanwhile
        mode = {"auto_dispatch_capture": True, "capture_error_mode": "thread_local"}
        with torch.npu.graph(graph, pool=self._pool, **mode):
            logits, _ = self._step(self._ops, params, kv, meta)
        self._pool = self._pool or graph.pool()
        return graph, logits, meta
