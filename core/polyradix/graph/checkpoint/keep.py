"""Which parameters a backend takes as the checkpoint has them, and what becomes of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from polyradix.backend.protocol import HOST_DTYPES, ParamSpec
from polyradix.graph.checkpoint.base import Checkpoint, Stored
from polyradix.graph.dense import ParamTable, pieces
from polyradix.graph.mla import row_order
from polyradix.graph.spec import ModelSpec

_KINDS = ("linear", "linear_reduce", "experts")


def keep(table: ParamTable, checkpoint: Checkpoint, model: ModelSpec, features: frozenset[str]) -> ParamTable:
    """`table` with a Quant for each parameter that is stored in one format, of those in `features`, in whole blocks."""

    def one(p: ParamSpec, layer: int) -> ParamSpec:
        held = list(_stored(checkpoint, model, p, layer))
        quants = {stored.parts.quant if stored and stored.parts else None for stored, _ in held}
        quant = quants.pop() if len(quants) == 1 and p.kind in _KINDS else None
        if quant is None or quant.feature not in features or quant.block[1] == 1:  # a scale a column costs more
            return p
        order, tall = None if model.latent is None else row_order(model.latent, p.name), quant.block[0]
        cut = len(held) > 1 and any(rows % tall for _, rows in held)
        moved = order is not None and tall > 1 and (order // tall != np.arange(len(order)) // tall).any()
        return p if cut or moved else replace(p, quant=quant)

    return ParamTable(table.top, tuple(tuple(one(p, i) for p in params) for i, params in enumerate(table.layers)))


def report(table: ParamTable, checkpoint: Checkpoint, model: ModelSpec) -> list[str]:
    """For each format: how many weights, their bytes, and what they become."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for layer, params in [(None, table.top), *enumerate(table.layers)]:
        for p in params:
            for stored, rows in _stored(checkpoint, model, p, layer):
                if stored is not None:
                    dense = rows * p.shape[-1] * HOST_DTYPES[p.dtype].itemsize
                    row = sums[stored.what, "" if p.quant else p.dtype]
                    row[:] = row[0] + 1, row[1] + stored.nbytes, row[2] + dense
    return [
        f"{count} weights in {what}, {size:,} bytes, "
        + (f"are dequantised to {dtype}, {dense:,} bytes" if dtype else "are kept so")
        for (what, dtype), (count, size, dense) in sums.items()
    ]


def _stored(
    checkpoint: Checkpoint, model: ModelSpec, p: ParamSpec, layer: int | None
) -> Iterator[tuple[Stored | None, int]]:
    """And the rows, of each of the tensors that make up a parameter."""
    for name, rows in pieces(model, p, layer):
        yield checkpoint.stored.get(f"{name}.weight"), rows
