"""What the collectives must give, in plain loops over ranks. Imports no backend.

`xs` holds each rank's array in rank order, and so does every answer. Sums are taken at a Precision, rounded after every
addition, as a ring of ranks may do; everything else moves values and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyradix_conformance.oracle import Arr, Precision


def all_reduce(p: Precision, xs: Sequence[Arr]) -> list[Arr]:
    (total,) = p.take(np.zeros_like(xs[0]))
    for x in xs[:: p.order or 1]:
        total = p.round(total + x.astype(p.wide)).astype(p.wide)
    return [total.astype(np.float64)] * len(xs)


def reduce_scatter(p: Precision, xs: Sequence[Arr], axis: int) -> list[Arr]:
    return [part(total, rank, len(xs), axis) for rank, total in enumerate(all_reduce(p, xs))]


def all_gather(xs: Sequence[Arr], axis: int) -> list[Arr]:
    return [joined(xs, axis)] * len(xs)


def all_to_all(xs: Sequence[Arr], axis: int) -> list[Arr]:
    return [joined([part(x, rank, len(xs), axis) for x in xs], axis) for rank in range(len(xs))]


def broadcast(xs: Sequence[Arr], root: int) -> list[Arr]:
    return [xs[root]] * len(xs)


def permute(xs: Sequence[Arr], to: Sequence[int]) -> list[Arr]:
    out = list(xs)
    for rank, x in enumerate(xs):
        out[to[rank]] = x
    return out


def barrier(xs: Sequence[Arr]) -> list[Arr]:
    return list(xs)


def part(x: Arr, i: int, n: int, axis: int) -> Arr:
    """Part i of n equal ones."""
    size = x.shape[axis] // n
    return x.take(range(i * size, (i + 1) * size), axis)


def joined(xs: Sequence[Arr], axis: int) -> Arr:
    size, shape = xs[0].shape[axis], list(xs[0].shape)
    shape[axis] *= len(xs)
    out = np.empty(shape)
    for i, x in enumerate(xs):
        at: list[slice] = [slice(None)] * out.ndim
        at[axis] = slice(i * size, (i + 1) * size)
        out[tuple(at)] = x
    return out
