"""Finds decode rows that start with the same pages, and cuts the reading of those pages into work for the GPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from polyradix.backend.batch import I32, HostBatch
from polyradix_torch.triton.attention import MEMBERS, MOST_PARTS, UNIT, Shared

LEAST_KEYS = 256  # shared by a group
LEAST_MEMBERS = 4  # of a group
LEAST_SAVED = 16384  # keys that a step need not read again; fewer do not pay for two more kernels
LEAST_SAVED_LATENT = (
    1 << 18
)  # of latent rows, whose shared ones are bound by products: 130,000 saved did not pay on an H200
ITEMS = 32  # to have when there are few groups: with 8 kv heads, two programs for every processor of an H100


def most_items(rows: int) -> int:
    """Of a batch of so many decode rows."""
    return ITEMS + rows // LEAST_MEMBERS


def plan(batch: HostBatch, single: I32, page: int, room: int, latent: bool = False) -> I32 | None:
    """What `view` takes, for the sequences `single` of one row each, up to `room`; None where sharing does not pay."""
    found = groups(batch, single, page, LEAST_SAVED_LATENT if latent else LEAST_SAVED)
    if found is None:
        return None
    rows, counts, common = found
    tiles = -(-counts // MEMBERS)
    chunk = np.maximum(-(-int(tiles @ common) // ITEMS), -(-common // MOST_PARTS))
    chunk = -(-chunk // UNIT) * UNIT
    out = np.zeros(3 * room + 5 * most_items(room), np.int32)
    out[rows] = np.repeat(common, counts)
    out[room + rows] = np.repeat(-(-common // chunk), counts)
    out[2 * room :][: len(rows)] = rows
    items = [
        (first + i, min(MEMBERS, count - i), begin, min(begin + step, keys), begin // step)
        for first, count, keys, step in np.stack([np.cumsum(counts) - counts, counts, common, chunk], 1).tolist()
        for i in range(0, count, MEMBERS)
        for begin in range(0, keys, step)
    ]
    out[3 * room :][: 5 * len(items)] = np.ravel(items)
    return out


def groups(batch: HostBatch, single: I32, page: int, saved: int | None = None) -> tuple[I32, I32, I32] | None:
    """Places in `single`, group by group; how many are in each; and how many first keys, all of them older than this
    batch, those share. None where fewer than `saved` keys (LEAST_SAVED) need not be read again."""
    depth = -(-LEAST_KEYS // page) - 1  # members of a group have the same page here
    if len(single) < LEAST_MEMBERS or batch.pages.shape[1] <= depth:
        return None
    ids = batch.pages[single, depth]
    rows = np.argsort(ids, kind="stable").astype(np.int32)
    ids = ids[rows]
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    counts = np.diff(starts, append=len(ids)).astype(np.int32)
    rows, counts = _only((counts >= LEAST_MEMBERS) & (ids[starts] > 0), rows, counts)
    if not len(counts):
        return None
    starts, seqs = np.cumsum(counts) - counts, single[rows]
    pages = batch.pages[seqs]
    same = pages == np.repeat(pages[starts], counts, axis=0)
    whole = np.where(same.all(1), same.shape[1], same.argmin(1)) * page
    common = (
        np.minimum.reduceat(np.minimum(whole, batch.kv_len[seqs] - np.diff(batch.cu_q)[seqs]), starts) // UNIT * UNIT
    )
    kept = common >= LEAST_KEYS
    if (common * (counts - 1))[kept].sum() < (LEAST_SAVED if saved is None else saved):
        return None
    return *_only(kept, rows, counts), common[kept].astype(np.int32)


def _only(kept: NDArray[np.bool_], rows: I32, counts: I32) -> tuple[I32, I32]:
    return rows[np.repeat(kept, counts)], counts[kept]


def view(flat: torch.Tensor, room: int, rows: int) -> Shared:
    """A plan made for `room` sequences, on the device, as that of the first `rows`."""
    common, parts, members = flat[: 3 * room].view(3, room)[:, :rows]
    return Shared(common, parts, members, flat[3 * room :].view(-1, 5)[: most_items(rows)])
