"""A batch on the device, as attention there wants it: of a sequence's pages those that it still has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import I32, HostBatch
from polyradix_torch.ops import TorchMeta


class Eager(Exception):
    """A verb has Python read lengths, which a graph would keep for good: no graph is captured of this step."""


@dataclass(kw_only=True)
class NpuMeta(TorchMeta):
    """Index tensors are int32. Keys given back are neither in `pages` nor in `kv_len`: they lie before every window,
    and masks count from the newest key."""

    newest: torch.Tensor  # [S] kv_len - 1
    captured: bool = False  # kv_len is given anew at each replay

    def read_lengths(self) -> None:
        """Before Python reads kv_len. Raises Eager where that is not the lengths of what will run."""
        if self.captured:
            raise Eager


@dataclass(frozen=True)
class Held:
    """Of one group: where new rows go [T], the pages that are there [S,P], and how many keys they hold [S]."""

    slots: I32
    pages: I32
    kv_len: I32


def held(batch: HostBatch, page: int) -> list[Held]:
    """For each group of the cache."""
    if not batch.others:
        return [Held(batch.slots, batch.pages, batch.kv_len)]
    return [_held(table, page) for table in batch.by_group]


def _held(batch: HostBatch, page: int) -> Held:
    pages, before = batch.pages, (batch.kv_len - np.diff(batch.cu_q)) // page
    gone = np.minimum((np.cumsum(pages, axis=1) == 0).sum(axis=1), before)
    if not gone.any():
        return Held(batch.slots, pages, batch.kv_len)
    kv_len = batch.kv_len - np.int32(page) * gone.astype(np.int32)
    at = gone[:, None] + np.arange(-(-int(kv_len.max()) // page))
    return Held(batch.slots, np.take_along_axis(pages, np.minimum(at, pages.shape[1] - 1), axis=1), kv_len)


def grouped(first: NpuMeta, others: list[dict[str, Any]]) -> NpuMeta:
    """The batch as its first group sees it, and the fields that differ for those after it."""
    return replace(first, others=tuple(replace(first, **fields) for fields in others))
