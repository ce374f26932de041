"""L1 and L2: full and windowed layers in groups of their own, which give pages back. Whatever nobody owns is NaN."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch, Table
from polyradix.backend.protocol import AttnSpec, Heads, KVSpec, Params
from polyradix_conformance.cases import case
from polyradix_conformance.flow import expected, rows_of
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.oracle import HOST, Attention
from polyradix_conformance.rig import Rig, parts_of, same

GROUPS = ((1,), (0, 2))
WINDOW = 21
LAYERS = sum(map(len, GROUPS))


class Flow:
    """Sequences through LAYERS layers of attention, whose outputs of the last token of each part a step gives.

    A row of the carry has the inputs of a token, which layer i sees turned by i columns, and room for the output of
    each layer. Pages come from one pool, whichever group they are for: those given back first, newest first.
    """

    def __init__(self, rig: Rig, dim: int = 64) -> None:
        page = self.page = rig.page
        self.rig, self.lengths = rig, (2 * page + WINDOW + 1, page + 30, 3)
        self.rows = Ragged(self.lengths, page)
        self.heads = Heads(q=2 * rig.ranks, kv=rig.ranks, dim=dim)
        inputs = rows_of(rig.dtype, "normal", self.heads, sum(self.lengths))
        self.inputs, self.room = inputs.shape[1], LAYERS * self.heads.q * self.heads.dim
        embed = np.pad(inputs, ((0, 0), (0, self.room)))
        end = np.eye(self.room, self.inputs + self.room, self.inputs)
        top = {"x": rig.pack("embed", embed), "end": rig.pack("logits", end)}
        self.run = rig.compile(self._step, Params(top, [self._weights(i) for i in range(LAYERS)]))
        self.spec = KVSpec(LAYERS, self.heads.kv, self.heads.dim, page, rig.dtype, groups=GROUPS)
        self.pages = 1 + len(GROUPS) * sum(-(-n // page) for n in self.lengths)
        self.pool = np.random.default_rng(5).permutation(np.arange(1, self.pages)).tolist()
        self.tables: list[list[list[int]]] = [[[] for _ in self.lengths] for _ in GROUPS]
        self.kv = rig.backend.alloc_kv(self.spec, self.pages)
        self.ruin(list(range(self.pages)))

    def step(self, parts: list[Part]) -> None:
        """Runs one batch and compares it with the oracle. Windowed layers have given back what it does not see."""
        for part in parts:
            self._give_back(part)
            for table in self.tables:
                missing = -(-part.stop // self.page) - len(table[part.seq])
                table[part.seq] += [self.pool.pop() for _ in range(missing)]
        self.ruin([0])
        out, self.kv = self.run(self.kv, self._batch(parts))
        got = self.rig.fetch(out, (len(parts), self.room)).reshape(len(parts), LAYERS, self.heads.q, self.heads.dim)
        last = [int(self.rows.ids(part)[-1]) for part in parts]
        for layer in range(LAYERS):
            a = Attention(self.heads.dim**-0.5, window_of(layer))
            truth, floors = expected(self.rig.dtype, "normal", self.heads, self.lengths, a, layer)
            self.rig.close(f"layer {layer} of {parts}", got[:, layer], truth[last], floors[last])

    def ruin(self, pages: list[int]) -> None:
        size = (self.spec.parts, self.spec.depth, len(pages), self.page, self.heads.kv, self.heads.dim)
        self.kv = self.rig.backend.import_pages(self.kv, pages, np.full(size, np.nan, HOST[self.rig.dtype]))

    def _give_back(self, part: Part) -> None:
        table = self.tables[1][part.seq]
        for i in range(max(0, part.start - WINDOW + 1) // self.page):
            if table[i]:
                self.ruin([table[i]])
                self.pool.append(table[i])
                table[i] = 0

    def _batch(self, parts: list[Part]) -> HostBatch:
        width = max(-(-part.stop // self.page) for part in parts)
        tables = []
        for owned in self.tables:
            pages = np.zeros((len(parts), width), np.int32)
            for s, part in enumerate(parts):
                pages[s, : len(owned[part.seq])] = owned[part.seq]
            at = [np.arange(part.start, part.stop) for part in parts]
            slots = [row[x // self.page] * self.page + x % self.page for row, x in zip(pages, at, strict=True)]
            tables.append(Table(np.concatenate(slots).astype(np.int32), pages))
        plain = self.rows.batch(parts)
        rest = plain.cu_q, plain.kv_len, tables[0].pages, plain.last, plain.from_prev
        return HostBatch(plain.tokens, plain.positions, tables[0].slots, *rest, others=tuple(tables[1:]))

    def _weights(self, layer: int) -> dict[str, Any]:
        """`heads` picks q, k and v from the inputs; `out` puts the output into the layer's room."""
        width, parts = self.heads.q * self.heads.dim, parts_of(self.heads)
        pick = np.pad(np.roll(np.eye(self.inputs), layer, axis=1), ((0, 0), (0, self.room)))
        put = np.eye(self.inputs + self.room, width, -self.inputs - layer * width)
        return {"heads": self.rig.pack("linear", pick, segments=parts), "out": self.rig.pack("linear_reduce", put)}

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        def body(window: int | None) -> Any:
            spec = AttnSpec(self.heads, self.heads.dim**-0.5, window)

            def run(w: dict[str, Any], x: Any, kv: Any) -> Any:
                out, kv = ops.attend(*ops.qkv(x, w["heads"], self.heads), kv, m, spec)
                return ops.add(x, ops.linear_reduce(out, w["out"])), kv

            return run

        kinds = {window: body(window) for window in (None, WINDOW)}
        bodies = [kinds[window_of(i)] for i in range(LAYERS)]
        x, kv = ops.layers(bodies, params.layers, ops.embed(params.top["x"], m), kv)
        return ops.logits(ops.last(x, m), params.top["end"]), kv


def window_of(layer: int) -> int | None:
    return WINDOW if layer in GROUPS[1] else None


def decode(flow: Flow) -> None:
    """The long sequences whole but for their last three tokens, which then come one by one in both at once; with the
    second the longest gives a page back."""
    starts = [n - 3 for n in flow.lengths[:2]]
    flow.step([Part(s, 0, at) for s, at in enumerate(starts)])
    for i in range(3):
        flow.step([Part(s, at + i, at + i + 1) for s, at in enumerate(starts)])


def chunked(flow: Flow) -> None:
    """Chunks of 43 tokens of the long sequences, and the tokens of the shortest one by one."""
    for i in range(0, flow.lengths[0], 43):
        parts = [Part(s, i, min(i + 43, n)) for s, n in enumerate(flow.lengths[:2]) if i < n]
        flow.step(parts + ([Part(2, i // 43, i // 43 + 1)] if i // 43 < flow.lengths[2] else []))


def moved(flow: Flow) -> None:
    """Between decodes the pages of all groups go elsewhere, by copies and through an export."""
    at = [n - 2 for n in flow.lengths]
    flow.step([Part(s, 0, n) for s, n in enumerate(at)])
    flow.step([Part(s, n, n + 1) for s, n in enumerate(at)])
    owned = sorted({page for table in flow.tables for row in table for page in row if page})
    to = dict(zip(owned, owned[1:] + owned[:1], strict=True))
    data = flow.rig.export(flow.kv, owned[::2])
    plain = replace(flow.spec, layers=flow.spec.depth, groups=())
    same("bytes of a page", *([flow.rig.backend.kv_page_bytes(spec)] for spec in (flow.spec, plain)))
    same("an export's arrays", [data.shape[1]], [plain.layers])
    flow.kv = flow.rig.backend.copy_pages(flow.kv, owned[1::2], [to[page] for page in owned[1::2]])
    flow.kv = flow.rig.backend.import_pages(flow.kv, [to[page] for page in owned[::2]], data)
    flow.tables = [[[to.get(page, 0) for page in row] for row in table] for table in flow.tables]
    flow.step([Part(s, n + 1, n + 2) for s, n in enumerate(at)])


def run(rig: Rig, plan: Any, dim: int = 64) -> None:
    plan(Flow(rig, dim))


for dtype in ("float32", "bfloat16"):
    for plan in (decode, chunked):
        case(f"L1/kv_groups/{plan.__name__}", dtype, partial(run, plan=plan), features=("kv_groups", "window"))
    case("L2/kv_groups/moved", dtype, partial(run, plan=moved), features=("kv_groups", "window"))
case("L5/kv_groups/tp-2", "float32", partial(run, plan=moved), features=("kv_groups", "window"), tp=2, profile="mesh")
