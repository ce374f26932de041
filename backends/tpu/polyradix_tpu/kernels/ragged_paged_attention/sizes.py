"""The static and the dynamic description of one call of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyradix_tpu.kernels.chip import LANES

ALIGN = 16  # rows: the tile of bfloat16, so that copies of query rows begin and end where a tile does
NEVER = 1 << 30  # the offset of a column that no row sees


@dataclass(frozen=True)
class Sizes:
    """What one kernel is compiled for. `tile` 1 is flat; see kernel."""

    tile: int  # query rows of an item
    heads: int  # Hk
    pack: int  # values of the cache in 32 bits; if two, those are a key's and its value's
    page: int
    block: int  # pages of a block
    buffers: int
    items: int  # per grid step; flat only
    cores: int
    scale: float
    window: int | None
    softcap: float | None

    @property
    def rows(self) -> int:
        """Of the cache, per token."""
        return 2 * self.heads

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.block * self.page

    @property
    def columns(self) -> int:
        """Of a block's scores."""
        return self.tokens * (self.heads if self.tile == 1 else 1)

    @property
    def chunk(self) -> int:
        """Columns whose offsets are those of any other chunk, but for `step` tokens from one chunk to the next."""
        return LANES if self.tile > 1 or LANES % (self.pack * self.heads) == 0 else self.columns

    @property
    def step(self) -> int:
        return self.chunk if self.tile > 1 else self.chunk // (self.pack * self.heads)

    def offsets(self, rows: int) -> NDArray[np.int32]:
        """[rows, chunk]: token of the column minus query row in the item; NEVER for other heads' columns."""
        at, row = np.arange(self.chunk, dtype=np.int32), np.arange(rows, dtype=np.int32)[:, None]
        if self.tile > 1:
            return at - row % self.tile
        key = at // self.pack + at % self.pack * (self.columns // self.pack)  # the order that keys_values leaves
        mine = key % self.heads == row // (rows // self.heads)
        return np.where(mine, key // self.heads, np.int32(NEVER))


@dataclass(frozen=True)
class Items:
    """What to compute, int32 [items] each; `table` [S*P] is the page table."""

    table: Any
    start: Any  # index in `table` of the first page to read
    pages: Any  # how many; 0: nothing to do
    query: Any  # first query row's position, minus that of the first key to read
    keys: Any  # keys from there on; what is behind them in their page may be anything
    at: Any  # split: where the item's rows are in q, a multiple of ALIGN
    count: Any  # split: how many
