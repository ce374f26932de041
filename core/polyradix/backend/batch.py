"""What the core hands to a backend per step: plain NumPy, int32 throughout. Both are read-only after construction."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

I32: TypeAlias = NDArray[np.int32]
F32: TypeAlias = NDArray[np.float32]


class Table(NamedTuple):
    """Where the layers of one group of KVSpec write and read; as the fields of HostBatch."""

    slots: I32  # [T]
    pages: I32  # [S,P]


@dataclass(frozen=True)
class HostBatch:
    """One ragged batch of T tokens in S sequences: prefill, chunked prefill, decode or a mix.

    The tokens of sequence s are rows cu_q[s]:cu_q[s+1]; they are its newest, so its last query row has position
    kv_len[s] - 1. `slots` says where each row's k and v go: page * page_size + offset, a distinct slot per row.

    Of a cache in groups, `slots` and `pages` are group 0's and `others` has those of the groups after it. No page is in
    the tables of two groups. A table may have 0 for a page that was given back, all of whose tokens lie before the
    windows of this batch's rows; P is the same for all.
    """

    tokens: I32  # [T] token ids; ignored where from_prev >= 0
    positions: I32  # [T] position of the token in its sequence, from 0
    slots: I32  # [T]
    cu_q: I32  # [S+1] row offsets, cu_q[0] = 0, cu_q[S] = T
    kv_len: I32  # [S] tokens in the cache after this batch is written
    pages: I32  # [S,P] page ids in sequence order; entries beyond kv_len are 0
    last: I32  # [S] the row whose logits are wanted, cu_q[s+1] - 1
    from_prev: I32  # [T] row of the previous step's samples that holds the token, or -1
    others: tuple[Table, ...] = field(default=(), kw_only=True)

    @property
    def by_group(self) -> list[HostBatch]:
        """The batch as the layers of each group see it, without `others`."""
        if not self.others:
            return [self]
        tables = (Table(self.slots, self.pages), *self.others)
        return [replace(self, slots=t.slots, pages=t.pages, others=()) for t in tables]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_seqs(self) -> int:
        return len(self.kv_len)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, sequences, and the most keys that a sequence has."""
        return self.num_tokens, self.num_seqs, int(self.kv_len.max(initial=0))

    def check_prev(self, prev: Any) -> None:
        """Raises ValueError if tokens are to be taken from previous samples, and there are none."""
        if prev is None and (self.from_prev >= 0).any():
            raise ValueError("from_prev names rows of the previous samples, but prev is None")


@dataclass(frozen=True)
class Adjust:
    """Single logits changed before anything else: the logit x of token `id[i]` in row `row[i]` becomes
    (x / factor[i] if x > 0 else x * factor[i]) + add[i], all in float32. A (row, id) comes once at most. Penalties and
    biases are made of it: repetition is a factor (Keskar et al., "CTRL", 2019), frequency and presence are sums."""

    row: I32  # [N] 0 to S - 1
    id: I32  # [N] 0 to V - 1
    factor: F32  # [N] above 0
    add: F32  # [N] finite


@dataclass(frozen=True)
class SampleBatch:
    """How to sample each of S rows; the semantics are in backend/sampling.py."""

    temperature: F32  # [S] 0 means greedy
    top_k: I32  # [S] 0 means off
    top_p: F32  # [S] in (0, 1]; 1 means off
    min_p: F32  # [S] in [0, 1]; 0 means off
    seed: I32  # [S] any 32 bits
    position: I32  # [S] position of the token being sampled
    mask: I32 | None = None  # [S, ceil(V/32)] bit t of word t//32 allows token t; None allows all
    adjust: Adjust | None = None

    @property
    def greedy(self) -> bool:
        """True when every row is greedy: without mask and adjust, a backend may take its argmax path."""
        return not self.temperature.any()
