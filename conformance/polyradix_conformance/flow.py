"""Attention over ragged sequences in a poisoned cache: what the attention and the state cases share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from polyradix.backend.protocol import AttnSpec, Heads, KVSpec, Params
from polyradix_conformance import oracle
from polyradix_conformance.inputs import Part, Ragged, values
from polyradix_conformance.oracle import EXACT, HOST, Arr, Attention
from polyradix_conformance.rig import Rig
from polyradix_conformance.tolerance import floor


@cache
def rows_of(dtype: str, regime: str, heads: Heads, rows: int) -> Arr:
    """[rows, (Hq + 2 Hk) * D]: q, k and v side by side. The peaked regime makes softmax nearly one-hot."""
    x = values(
        f"qkv {heads} {rows}", (rows, heads.q + 2 * heads.kv, heads.dim), dtype, regime.replace("peaked", "normal")
    )
    if regime == "peaked":
        x[:, : heads.q] *= 8
    return x.reshape(rows, -1)


@cache
def expected(
    dtype: str, regime: str, heads: Heads, lengths: tuple[int, ...], attention: Attention, turn: int = 0
) -> tuple[Arr, Arr]:
    """Truth [rows,Hq,D], and floors [rows,Hq]: per head the largest floor in the sequence. `turn` is the layer."""
    x = np.roll(rows_of(dtype, regime, heads, sum(lengths)), -turn, axis=1).reshape(sum(lengths), -1, heads.dim)
    q, k, v = np.split(x, [heads.q, heads.q + heads.kv], axis=1)
    truths, floors, at = [], [], 0
    for n in lengths:
        rows = slice(at, at + n)
        truth, emulation = (
            oracle.attend(p, q[rows], k[rows], v[rows], attention) for p in (EXACT, oracle.emulated(dtype))
        )
        truths.append(truth)
        floors.append(np.tile(floor(truth, emulation, dtype).max(axis=0), (n, 1)))
        at += n
    return np.concatenate(truths), np.concatenate(floors)


def poison(spec: KVSpec, pages: int) -> Arr:
    """What a page holds that nobody owns: large values, so that reading one shows."""
    r = np.random.default_rng(99)
    shape = (2, spec.layers, pages, spec.page_size, spec.kv_heads, spec.head_dim)
    out: Arr = (r.choice([-1000.0, 1000.0], size=shape) + r.integers(-3, 3, size=shape) * 8).astype(HOST[spec.dtype])
    return out


class Flow:
    """Sequences going through `layers` layers of attention. Layer i sees the inputs turned by i columns."""

    def __init__(
        self,
        rig: Rig,
        ragged: Ragged,
        heads: Heads,
        attention: Attention,
        regime: str = "normal",
        layers: int = 1,
    ) -> None:
        self.rig, self.ragged, self.heads, self.attention, self.regime = rig, ragged, heads, attention, regime
        self.layers = layers
        self.x = rows_of(rig.dtype, regime, heads, ragged.rows)
        width = self.x.shape[1]
        parts = (heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim)
        params = [
            {
                "heads": rig.pack("linear", np.roll(np.eye(width), i, axis=1), segments=parts),
                "out": rig.pack("linear", np.eye(width)[:, : parts[0]]),
            }
            for i in range(layers)
        ]
        self.run = rig.compile(self._step, Params({"x": rig.pack("embed", self.x)}, params))
        self.spec, self.kv = self.fresh()

    def fresh(self) -> tuple[KVSpec, Any]:
        """A new cache with every page poisoned."""
        spec, kv = self.rig.kv(self.ragged.num_pages, self.heads, self.layers, self.ragged.page)
        pages = range(self.ragged.num_pages)
        return spec, self.rig.backend.import_pages(kv, pages, poison(spec, len(pages)))

    def step(self, parts: list[Part]) -> Arr:
        """Runs one batch; the last layer's output [T,Hq,D]."""
        out, self.kv = self.run(self.kv, self.ragged.batch(parts))
        count = sum(p.stop - p.start for p in parts)
        rows = self.rig.fetch(out, (count, self.x.shape[1]))
        return rows[:, : self.heads.q * self.heads.dim].reshape(count, self.heads.q, self.heads.dim)

    def check(self, what: str, plan: list[list[Part]]) -> None:
        """Every row of every batch against the oracle."""
        truth, floors = expected(
            self.rig.dtype, self.regime, self.heads, self.ragged.lengths, self.attention, self.layers - 1
        )
        for n, parts in enumerate(plan):
            ids = np.concatenate([self.ragged.ids(p) for p in parts])
            self.rig.close(f"{what}, batch {n}", self.step(parts), truth[ids], floors[ids])

    def export(self, pages: list[int]) -> Arr:
        return self.rig.backend.export_pages(self.kv, pages).result(timeout=60)

    def _step(self, ops: Any, params: Params, kv: Any, m: Any) -> tuple[Any, Any]:
        spec = AttnSpec(self.heads, self.attention.scale, self.attention.window, self.attention.softcap)

        def body(w: dict[str, Any], carry: Any, kv: Any) -> Any:
            x, _ = carry
            q, k, v = ops.qkv(x, w["heads"], self.heads)
            out, kv = ops.attend(q, k, v, kv, m, spec)
            return (x, ops.linear(out, w["out"])), kv

        x = ops.embed(params.top["x"], m)
        (_, out), kv = ops.layers(body, params.layers, (x, x), kv)
        return out, kv
