"""L1 and L2: attention over a cache of float8, and what the cache then holds, against the oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from polyradix.backend.protocol import AttnSpec, Heads, KVSpec, Params
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.flow import rows_of
from polyradix_conformance.inputs import Part, Ragged, ragged_lengths
from polyradix_conformance.oracle import EXACT, Arr, Attention
from polyradix_conformance.oracle_quant import nearest_e4m3
from polyradix_conformance.rig import Rig, same
from polyradix_conformance.tolerance import floor

HEADS = Heads(q=4, kv=2, dim=64)
ATTENTION = Attention(HEADS.dim**-0.5)


class Flow:
    """Sequences through one layer of attention; a step gives the output of the last token of each part."""

    def __init__(self, rig: Rig, large: bool = False) -> None:
        self.rig, self.ragged = rig, Ragged(ragged_lengths(rig.page), rig.page)
        x = rows_of(rig.dtype, "normal", HEADS, self.ragged.rows)
        self.x = oracle.rounded(np.where(np.abs(x) > 1.5, x * 300, x), rig.dtype) if large else x
        self.spec = KVSpec(1, HEADS.kv, HEADS.dim, rig.page, "float8_e4m3fn")
        self.kv = rig.backend.alloc_kv(self.spec, self.ragged.num_pages)
        width = HEADS.q * HEADS.dim
        top = {"x": rig.pack("embed", self.x), "pick": rig.pack_heads(HEADS), "end": rig.pack("logits", np.eye(width))}
        self.run = rig.compile(self._step, Params(top, [{}]))
        self.width = width

    def step(self, parts: list[Part]) -> Arr:
        out, self.kv = self.run(self.kv, self.ragged.batch(parts))
        return self.rig.fetch(out, (len(parts), self.width)).reshape(len(parts), HEADS.q, HEADS.dim)

    def held(self, part: Part) -> tuple[Arr, Arr]:
        """What the cache must hold of k and v [L,Hk,D], up to the end of a part."""
        rows = self.x[self.ragged.ids(Part(part.seq, 0, part.stop))].reshape(part.stop, -1, HEADS.dim)
        k, v = np.split(rows[:, HEADS.q :], 2, axis=1)
        return nearest_e4m3(k), nearest_e4m3(v)

    def truth(self, part: Part) -> tuple[Arr, Arr]:
        """The output [Hq,D] of a part's last token, and floors [Hq]."""
        q = self.x[self.ragged.ids(part)[-1:]].reshape(1, -1, HEADS.dim)[:, : HEADS.q]
        precisions = EXACT, *oracle.emulated(self.rig.dtype)
        truth, *others = (oracle.attend(p, q, *self.held(part), ATTENTION)[0] for p in precisions)
        return truth, floor(truth, others, self.rig.dtype)

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        def body(w: dict[str, Any], x: Any, kv: Any) -> Any:
            q, k, v = ops.qkv(x, params.top["pick"], HEADS)
            return ops.attend(q, k, v, kv, m, AttnSpec(HEADS, ATTENTION.scale))

        x, kv = ops.layers([body], params.layers, ops.embed(params.top["x"], m), kv)
        return ops.logits(ops.last(x, m), params.top["end"]), kv


def attend(rig: Rig, plan: str) -> None:
    flow = Flow(rig)
    for n, parts in enumerate(getattr(flow.ragged, plan)()):
        got = flow.step(parts)
        for part, row in zip(parts, got, strict=True):
            rig.close(f"batch {n}, sequence {part.seq}", row, *flow.truth(part))


def written(rig: Rig) -> None:
    """Every value is the nearest, and the largest where it is beyond."""
    flow = Flow(rig, large=True)
    whole = flow.ragged.whole()[0]
    flow.step(whole)
    for part in whole:
        data = rig.export(flow.kv, flow.ragged.pages[part.seq].tolist())
        same("the export's dtype", [data.dtype], [np.dtype(ml_dtypes.float8_e4m3fn)])
        got = flow.ragged.rows_in(data, part)[:, 0]
        for name, have, want in zip("kv", got, flow.held(part), strict=True):
            same(f"{name} of sequence {part.seq}", have, want)


def moved(rig: Rig) -> None:
    """Copies and imports of pages hold the same bits."""
    flow = Flow(rig)
    flow.step(flow.ragged.whole()[0])
    pages, spare = flow.ragged.pages[-1][:2].tolist(), flow.ragged.spare[:2]
    data = rig.export(flow.kv, pages)
    flow.kv = rig.backend.copy_pages(flow.kv, pages, spare)
    same("the copies", rig.export(flow.kv, spare).view(np.uint8), data.view(np.uint8))
    flow.kv = rig.backend.import_pages(flow.kv, spare[::-1], data)
    same("the imports", rig.export(flow.kv, spare[::-1]).view(np.uint8), data.view(np.uint8))


def size(rig: Rig) -> None:
    """A page of float8 takes a quarter of the bytes of float32, or half of those of bfloat16."""
    narrow, wide = (KVSpec(3, 2, 64, rig.page, d) for d in ("float8_e4m3fn", rig.dtype))
    share = {"float32": 4, "bfloat16": 2}[rig.dtype]
    rig.backend.alloc_kv(narrow, 2)
    same("bytes", [rig.backend.kv_page_bytes(narrow) * share], [rig.backend.kv_page_bytes(wide)])


for dtype in ("float32", "bfloat16"):
    for plan in ("whole", "decode", "chunked", "mixed"):
        case(f"L1/kv_fp8/{plan}", dtype, partial(attend, plan=plan), features=("kv_fp8",), profile="quant")
    for body in (written, moved, size):
        case(f"L2/kv_fp8/{body.__name__}", dtype, body, features=("kv_fp8",), profile="quant")
