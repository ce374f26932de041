"""Attention over ragged sequences in a poisoned cache: what the attention and the state cases share.

A row of the carry holds the inputs of a token (q, k, v side by side) and room for one attention output. Layers up to
`layers` attend over the inputs, layer i seeing them turned by i columns, and the last of these puts its output into the
room. The layers after it only write that output into their own k and v, from where every row of it is exported.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from polyradix.backend.protocol import AttnSpec, Heads, KVSpec, Params
from polyradix_conformance import oracle
from polyradix_conformance.inputs import Part, Ragged, values
from polyradix_conformance.oracle import EXACT, HOST, Arr, Attention
from polyradix_conformance.rig import Rig, parts_of
from polyradix_conformance.tolerance import floor


@cache
def rows_of(dtype: str, regime: str, heads: Heads, rows: int) -> Arr:
    """[rows, (Hq + 2 Hk) * D]. The peaked regime makes softmax nearly one-hot."""
    shape = (rows, heads.q + 2 * heads.kv, heads.dim)
    x = values(f"qkv {heads} {rows}", shape, dtype, regime.replace("peaked", "normal"))
    if regime == "peaked":
        x[:, : heads.q] *= 8
    return x.reshape(rows, -1)


@cache
def expected(
    dtype: str, regime: str, heads: Heads, lengths: tuple[int, ...], attention: Attention, turn: int
) -> tuple[Arr, Arr]:
    """Truth [rows,Hq,D], and floors [rows,Hq]: per head the largest floor in the sequence. `turn` is the layer."""
    x = np.roll(rows_of(dtype, regime, heads, sum(lengths)), -turn, axis=1).reshape(sum(lengths), -1, heads.dim)
    q, k, v = np.split(x, [heads.q, heads.q + heads.kv], axis=1)
    truths, floors, at = [], [], 0
    for n in lengths:
        rows = slice(at, at + n)
        truth, *others = (
            oracle.attend(p, q[rows], k[rows], v[rows], attention) for p in (EXACT, *oracle.emulated(dtype))
        )
        truths.append(truth)
        floors.append(np.tile(floor(truth, others, dtype).max(axis=0), (n, 1)))
        at += n
    whole = np.concatenate(floors)
    if attention.sinks:  # then the weight of a lone key has its score's error, which two emulations may both miss
        whole = np.broadcast_to(whole.max(axis=0), whole.shape)
    return np.concatenate(truths), whole


def poison(spec: KVSpec, pages: int) -> Arr:
    """What a page holds that nobody owns: large values, so that reading one shows."""
    r = np.random.default_rng(99)
    shape = (spec.parts, spec.depth, pages, spec.page_size, spec.kv_heads, spec.head_dim)
    out: Arr = (r.choice([-1000.0, 1000.0], size=shape) + r.integers(-3, 3, size=shape) * 8).astype(HOST[spec.dtype])
    return out


class Flow:
    """Sequences going through `layers` layers of attention, in a cache with every page poisoned."""

    def __init__(
        self, rig: Rig, ragged: Ragged, heads: Heads, attention: Attention, regime: str = "normal", layers: int = 1
    ) -> None:
        self.rig, self.ragged, self.heads, self.attention, self.regime = rig, ragged, heads, attention, regime
        self.layers = layers
        self.echoes = -(-heads.q // (2 * heads.kv))
        self.x = rows_of(rig.dtype, regime, heads, ragged.rows)
        room = np.zeros((ragged.rows, heads.q * heads.dim))
        embed, width = np.concatenate([self.x, room], axis=1), self.x.shape[1] + room.shape[1]
        top = {"x": rig.pack("embed", embed), "end": rig.pack("logits", np.eye(8, width))}
        if attention.sinks:
            top["sinks"] = rig.pack("sinks", np.array(attention.sinks))
        each = [self._weights(i) for i in range(layers + self.echoes)]
        self.run = rig.compile(self._step, Params(top, each))
        self.spec, kv = rig.kv(ragged.num_pages, heads, layers + self.echoes, ragged.page)
        self.kv = rig.backend.import_pages(kv, range(ragged.num_pages), poison(self.spec, ragged.num_pages))

    def step(self, parts: list[Part]) -> Arr:
        """Runs one batch; the output [T,Hq,D] of the last of `layers`."""
        _, self.kv = self.run(self.kv, self.ragged.batch(parts))
        each = []
        for part in parts:
            data = self.ragged.rows_in(self.export(self.ragged.pages[part.seq].tolist()), part)[:, self.layers :]
            each.append(np.concatenate([kv for layer in data.swapaxes(0, 1) for kv in layer], axis=1))
        return np.concatenate(each)[:, : self.heads.q]

    def check(self, what: str, plan: list[list[Part]]) -> None:
        """Every row of every batch against the oracle."""
        for n, parts in enumerate(plan):
            self.checked_step(f"{what}, batch {n}", parts)

    def checked_step(self, what: str, parts: list[Part]) -> Arr:
        """As step, compared with the oracle."""
        lengths, turn = self.ragged.lengths, self.layers - 1
        truth, floors = expected(self.rig.dtype, self.regime, self.heads, lengths, self.attention, turn)
        ids, got = np.concatenate([self.ragged.ids(p) for p in parts]), self.step(parts)
        self.rig.close(what, got, truth[ids], floors[ids])
        return got

    def contents(self, parts: list[Part]) -> Arr:
        """What the pages of the first `layers` hold after `parts` were written, in the export form."""
        ragged, out = self.ragged, poison(self.spec, self.ragged.num_pages)
        slots = np.concatenate([ragged.slots(p) for p in parts])
        ids = np.concatenate([ragged.ids(p) for p in parts])
        for layer in range(self.layers):
            x = np.roll(self.x[ids], -layer, axis=1).reshape(len(ids), -1, self.heads.dim)
            for i, part in enumerate(np.split(x[:, self.heads.q :], 2, axis=1)):
                out[i, layer, slots // ragged.page, slots % ragged.page] = part.astype(out.dtype)
        return out[:, : self.layers]

    def export(self, pages: list[int]) -> Arr:
        return self.rig.export(self.kv, pages)

    def _weights(self, layer: int) -> dict[str, Any]:
        """`heads` picks q, k and v from the carry; `out` puts the attention into the room, or nowhere."""
        parts, inputs = parts_of(self.heads), self.x.shape[1]
        room = parts[0]
        pick, put = np.zeros((inputs, inputs + room)), np.zeros((inputs + room, room))
        if layer < self.layers:
            pick[:, :inputs] = np.roll(np.eye(inputs), layer, axis=1)
        else:
            at, count = (layer - self.layers) * 2 * parts[1], 2 * parts[1]
            pick[room:, inputs:] = np.eye(count, room, at)
        if layer == self.layers - 1:
            put[inputs:] = np.eye(room)
        return {"heads": self.rig.pack("linear", pick, segments=parts), "out": self.rig.pack("linear_reduce", put)}

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        a, sinks = self.attention, params.top.get("sinks")
        spec = AttnSpec(self.heads, a.scale, a.window, a.softcap, sinks)

        def body(w: dict[str, Any], x: Any, kv: Any) -> Any:
            q, k, v = ops.qkv(x, w["heads"], self.heads)
            out, kv = ops.attend(q, k, v, kv, m, spec)
            return ops.add(x, ops.linear_reduce(out, w["out"])), kv

        x, kv = ops.layers([body] * len(params.layers), params.layers, ops.embed(params.top["x"], m), kv)
        return ops.logits(ops.last(x, m), params.top["end"]), kv
