"""Where a batch's keys lie, as AITER's calls want it: page by page of one token, one sequence after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from polyradix.backend.batch import I32, HostBatch
from polyradix_rocm.aiter.calls import MlaWork
from polyradix_rocm.slots import slots_of
from polyradix_torch.ops import TorchMeta
from polyradix_torch.triton.attention import Paged
from polyradix_torch.triton.ops import GpuMeta


@dataclass(frozen=True)
class Part:
    """Some sequences of a batch. i32: cu_q [S+1] of their rows, indptr [S+1] into slots, ones [S]. `longest` is the
    most new tokens, and tokens in all, of one. `rows` int64 are theirs in the batch, None for all."""

    rows: torch.Tensor | None
    cu_q: torch.Tensor
    indptr: torch.Tensor
    slots: torch.Tensor
    ones: torch.Tensor
    longest: tuple[int, int]
    work: dict[int, MlaWork] = field(default_factory=dict)  # by heads, made once a step


@dataclass(frozen=True)
class Plan:
    """The whole batch; its sequences with one new token, and those with more, or None without any."""

    whole: Part
    single: Part | None
    many: Part | None


@dataclass(frozen=True, kw_only=True)
class PlannedMeta(GpuMeta):
    plan: Plan


@dataclass(kw_only=True)
class PlannedTorchMeta(TorchMeta):
    plan: Plan


def plan(batch: HostBatch, page: int, device: str) -> Plan:
    new = np.diff(batch.cu_q)
    seqs = np.arange(len(new))
    whole = _part(batch, seqs, page, device)
    if new.min() > 1 or new.max() == 1:
        return Plan(whole, *((whole, None) if new.max() == 1 else (None, whole)))
    return Plan(whole, *(_part(batch, np.flatnonzero(kept), page, device) for kept in (new == 1, new > 1)))


def _part(batch: HostBatch, seqs: Any, page: int, device: str) -> Part:
    new, length, table = np.diff(batch.cu_q)[seqs], batch.kv_len[seqs], batch.pages[seqs]
    gone = np.zeros_like(length) if table[:, 0].all() else page * (np.cumsum(table, axis=1) == 0).sum(axis=1)
    length = length - gone  # keys given back lie before every window, and masks count from the end
    of, at = _numbered(length)
    at = at + gone[of]
    slots = table[of, at // page] * page + at % page
    of_row, row = _numbered(new)
    rows = None if len(seqs) == batch.num_seqs else _on(batch.cu_q[seqs[of_row]] + row, device, np.int64)
    cu_q, indptr, keys, ones = (_on(x, device) for x in (_ends(new), _ends(length), slots, np.ones(len(seqs))))
    return Part(rows, cu_q, indptr, keys, ones, (int(new.max()), int(length.max())))


def _numbered(counts: I32) -> tuple[Any, Any]:
    """For groups of so many: the group of each member, and its place there."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(_ends(counts)[:-1], counts)


def _ends(counts: I32) -> Any:
    return np.concatenate([[0], np.cumsum(counts)])


def _on(x: Any, device: str, dtype: Any = np.int32) -> torch.Tensor:
    return torch.from_numpy(x.astype(dtype)).to(device, non_blocking=True)


def planned(paged: Paged, page: int, most: int, window: int | None = None) -> Plan:
    """Of decodes that are on the device already, by launches of fixed shapes; `most` tokens in one sequence. Without
    pages that lie before the window."""
    length, start = paged.kv_len, paged.page_start
    if window is not None:
        gone = (length - window).clamp(min=0) // page
        length, start = length - gone * page, start + gone
    indptr = F.pad(length.cumsum(0), (1, 0)).int()
    slots = slots_of(paged.pages, start, indptr, page, most)
    whole = Part(None, paged.cu_q, indptr, slots, torch.ones_like(paged.kv_len), (1, most))
    return Plan(whole, whole, None)
