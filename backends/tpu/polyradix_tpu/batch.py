"""A HostBatch in static shapes: padded to a bucket, planned into tiles for attention, and sent as one int32 vector.

A tile is up to `shape.tile` neighbouring rows of one sequence. Padding is zeros: padded rows hold token 0 at position
0, write to page 0 and belong to no tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from polyradix.backend.batch import I32, HostBatch, Table
from polyradix.backend.protocol import Limits

TILE = 16  # query rows of one sequence that share one read of its keys
LEAST_TOKENS, LEAST_SEQS, LEAST_PAGES = 16, 8, 4  # the smallest buckets, the first two where not all are decodes


class Shape(NamedTuple):
    """The static sizes of one bucket: a program is compiled for each."""

    tokens: int
    seqs: int
    pages: int  # per sequence
    tile: int  # 1 when every sequence has one token
    groups: int = 1

    @property
    def tiles(self) -> int:
        """Enough however the tokens are spread over the sequences."""
        return self.seqs if self.tile == 1 else self.tokens // self.tile + self.seqs

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the vector, in order."""
        t, s = (self.tokens,), (self.seqs,)
        return {
            "tokens": t,
            "from_prev": t,
            "positions": t,
            "slots": t,
            "where": t,
            "cu_q": (self.seqs + 1,),
            "kv_len": s,
            "last": s,
            "pages": (self.seqs, self.pages),
            "tile_row": (self.tiles,),
            "tile_seq": (self.tiles,),
            "num_seqs": (1,),
            "other_slots": (self.groups - 1, self.tokens),
            "other_pages": (self.groups - 1, self.seqs, self.pages),
        }

    @property
    def length(self) -> int:
        """Of the vector."""
        return sum(int(np.prod(shape)) for shape in self.fields().values())


@dataclass(frozen=True)
class JaxMeta:
    """The batch inside a step, all int32. Row r of tile i is the batch's row tile_row[i] + r, of sequence tile_seq[i];
    rows that run past their sequence mean nothing. `where` finds a batch's row among the rows of all tiles."""

    shape: Shape
    tokens: jax.Array  # [T]
    from_prev: jax.Array  # [T] already put into tokens
    positions: jax.Array  # [T]
    slots: jax.Array  # [T]
    where: jax.Array  # [T]
    cu_q: jax.Array  # [S+1]
    kv_len: jax.Array  # [S] 0 for padding
    last: jax.Array  # [S]
    pages: jax.Array  # [S,P]
    tile_row: jax.Array  # [tiles]
    tile_seq: jax.Array  # [tiles]
    num_seqs: jax.Array  # [1]
    other_slots: jax.Array  # [G-1,T]
    other_pages: jax.Array  # [G-1,S,P]

    def of(self, group: int) -> JaxMeta:
        """As the layers of this group see the batch."""
        if not group:
            return self
        return replace(self, slots=self.other_slots[group - 1], pages=self.other_pages[group - 1])


def unpack(vector: jax.Array, shape: Shape) -> JaxMeta:
    """The vector of `pack`, inside a trace."""
    parts: dict[str, Any] = {}
    at = 0
    for name, size in shape.fields().items():
        stop = at + int(np.prod(size))
        parts[name] = vector[at:stop].reshape(size)
        at = stop
    return JaxMeta(shape, **parts)


@dataclass(frozen=True)
class Ladder:
    """Sizes least * growth**n, the same for tokens, sequences and pages; and the rows of a tile, 1 for decodes."""

    growth: int
    tile: int = TILE

    def up(self, n: int, least: int = 1) -> int:
        """The smallest size that holds n."""
        size = least
        while size < n:
            size *= self.growth
        return size

    def sizes(self, most: int, least: int = 1) -> Iterator[int]:
        """Up to the one that holds `most`."""
        size = least
        while size < most:
            yield size
            size *= self.growth
        yield size

    def shape(self, b: HostBatch) -> Shape:
        pages, groups = self.up(b.pages.shape[1], LEAST_PAGES), 1 + len(b.others)
        if b.num_tokens == b.num_seqs:
            seqs = self.up(b.num_seqs)
            return Shape(seqs, seqs, pages, 1, groups)
        return Shape(self.up(b.num_tokens, LEAST_TOKENS), self.up(b.num_seqs, LEAST_SEQS), pages, self.tile, groups)

    def all_shapes(self, limits: Limits, page_size: int, groups: int = 1) -> Iterator[Shape]:
        """Every bucket that a batch within `limits` may meet."""
        for pages in self.sizes(-(-limits.max_context // page_size), LEAST_PAGES):
            for seqs in self.sizes(limits.max_seqs):
                yield Shape(seqs, seqs, pages, 1, groups)
            for seqs in self.sizes(limits.max_seqs, LEAST_SEQS):
                for tokens in self.sizes(limits.max_tokens, LEAST_TOKENS):
                    if tokens * self.growth > seqs:  # else there are more sequences than tokens
                        yield Shape(tokens, seqs, pages, self.tile, groups)


def pack(b: HostBatch, shape: Shape) -> I32:
    """The vector that `unpack` takes apart."""
    tile_row, tile_seq, where = _tiles(b, shape.tile)
    cu_q = np.full(shape.seqs + 1, b.num_tokens)
    cu_q[: b.num_seqs + 1] = b.cu_q
    num_seqs = np.array([b.num_seqs])
    values = {**vars(b), "where": where, "cu_q": cu_q, "num_seqs": num_seqs}
    values |= {"tile_row": tile_row, "tile_seq": tile_seq}
    for i, name in enumerate(Table._fields):
        values[f"other_{name}"] = np.array([t[i] for t in b.others] or np.zeros((0, *getattr(b, name).shape)))
    out = np.zeros(shape.length, np.int32)
    at = 0
    for name, size in shape.fields().items():
        stop, value = at + int(np.prod(size)), values[name]
        out[at:stop].reshape(size)[tuple(map(slice, value.shape))] = value
        at = stop
    return out


def _tiles(b: HostBatch, tile: int) -> tuple[I32, I32, I32]:
    counts = -(-np.diff(b.cu_q) // tile)
    seqs = np.repeat(np.arange(b.num_seqs), counts)
    first = np.cumsum(counts) - counts  # tile of each sequence
    rows = b.cu_q[seqs] + (np.arange(len(seqs)) - first[seqs]) * tile
    row_seq = np.repeat(np.arange(b.num_seqs), np.diff(b.cu_q))
    where = first[row_seq] * tile + np.arange(b.num_tokens) - b.cu_q[row_seq]
    return rows.astype(np.int32), seqs.astype(np.int32), where.astype(np.int32)
