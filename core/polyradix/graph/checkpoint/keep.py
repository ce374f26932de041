"""Which parameters a backend takes as the checkpoint has them, and what becomes of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from polyradix.backend.protocol import HOST_DTYPES, ParamSpec
from polyradix.backend.shard import local_param
from polyradix.graph.checkpoint.base import Checkpoint, Stored
from polyradix.graph.dense import ParamTable, pieces
from polyradix.graph.mla import row_order
from polyradix.graph.spec import ModelSpec

_KINDS = ("linear", "linear_reduce", "experts")
_NARROWEST = {"fp8": 16, "int4": 32}  # columns of a rank's blocks; GPUs have no products for fewer


def keep(
    table: ParamTable, checkpoint: Checkpoint, model: ModelSpec, features: frozenset[str], tp: int = 1
) -> ParamTable:
    """`table` with a Quant for each parameter that is stored in one format, of those in `features`, in whole blocks,
    unless `tp` ranks cut them too narrow."""

    def one(p: ParamSpec, layer: int) -> ParamSpec:
        held = list(_stored(checkpoint, model, p, layer))
        quants = {stored.parts.quant if stored and stored.parts else None for stored, _ in held}
        quant = quants.pop() if len(quants) == 1 and p.kind in _KINDS else None
        if quant is None or quant.feature not in features or quant.block[1] == 1:  # a scale a column costs more
            return p
        order, tall = None if model.latent is None else row_order(model.latent, p.name), quant.block[0]
        cut = len(held) > 1 and any(rows % tall for _, rows in held)
        moved = order is not None and tall > 1 and (order // tall != np.arange(len(order)) // tall).any()
        here = replace(p, quant=quant)
        return p if cut or moved or _narrow(here, tp) else here

    return ParamTable(table.top, tuple(tuple(one(p, i) for p in params) for i, params in enumerate(table.layers)))


def cuts(table: ParamTable, checkpoint: Checkpoint, model: ModelSpec, features: frozenset[str], tp: int) -> list[str]:
    """Which blocks `tp` ranks cut, what becomes of them, and how many ranks cut none; arguments are those of `keep`.
    Parameters that share a line are named by their first tensor's first layer."""
    if tp == 1:
        return []
    names: dict[str, list[str]] = defaultdict(list)
    for layer, params in enumerate(keep(table, checkpoint, model, features).layers):
        for p in params:
            if what := _cut(p, model, tp):
                names[what].append(pieces(model, p, layer)[0][0])
    return [f"{first}{f' and {len(more)} more' if more else ''}: {what}" for what, (first, *more) in names.items()]


def _cut(p: ParamSpec, model: ModelSpec, tp: int) -> str | None:
    if p.quant is None or p.shard_axis is None or p.kind == "experts":
        return None
    sizes, what = (p.segments or p.shape[:1], "rows") if p.shard_axis == 0 else (p.shape[1:], "columns")
    block, local = p.quant.block[p.shard_axis], local_param(p, tp).quant
    assert local is not None

    def whole(ranks: int) -> bool:
        one = ranks == 1 or (len(sizes) == 1 and sizes[0] <= block)
        return all(n % ranks == 0 and (one or n // ranks % block == 0) for n in sizes)

    if whole(tp):
        return None
    most = max(sizes) // block
    few = [str(ranks) for ranks in range(1, max(1, most) + 1) if whole(ranks) and model.uneven_split(ranks) is None]
    then = "too narrow to keep, so it is dequantised" if _narrow(p, tp) else "so it has more scales"
    size = " and ".join(map(str, dict.fromkeys(sizes)))
    return (
        f"tp is {tp} and cuts blocks of {block} of the {size} {what} into {local.block[p.shard_axis]}, {then}; "
        f"tp {' or '.join(few)} cuts none"
    )


def _narrow(p: ParamSpec, tp: int) -> bool:
    """Whether ranks have fewer columns of a block than the checkpoint, and too few."""
    local = local_param(p, tp)
    if p.quant is None or local.quant is None or local.shape[-1] <= local.quant.block[1]:
        return False
    return local.quant.block[1] < min(p.quant.block[1], _NARROWEST[p.quant.format])


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
