"""Puts a HostBatch on the device in one copy: every field is a view of one int32 buffer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from polyradix.backend.batch import I32, HostBatch
from polyradix_torch.triton import latent, prefix
from polyradix_torch.triton.attention import Paged
from polyradix_torch.triton.ops import GpuMeta


def pinned(parts: list[I32], device: torch.device) -> torch.Tensor:
    """The parts one after another, on the host; pinned when the device is not the host itself."""
    host = torch.empty(sum(p.size for p in parts), dtype=torch.int32, pin_memory=device.type != "cpu")
    np.concatenate([p.ravel() for p in parts], out=host.numpy())
    return host


def flat_pages(batch: HostBatch, page: int) -> tuple[I32, I32]:
    """All sequences' pages one after another, and where each starts [S]."""
    counts = -(-batch.kv_len // page)
    starts = np.zeros(len(counts), np.int32)
    np.cumsum(counts[:-1], out=starts[1:])
    used = np.arange(batch.pages.shape[1])[None, :] < counts[:, None]
    return batch.pages[used], starts


def tiles(lengths: I32, rows: int) -> I32:
    """[n,2]: (sequence, first row) of every tile of `rows` query rows, for sequences of so many."""
    counts = -(-lengths // rows)
    seqs = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([seqs, first * rows], axis=1).astype(np.int32)


def shared_by(batch: HostBatch, seqs: I32, page: int) -> tuple[I32, I32]:
    """First keys that each sequence of the batch shares with others of `seqs`, in layers of one group, and the sequence
    that they are read of [S]."""
    common, leader = np.zeros(batch.num_seqs, np.int32), np.arange(batch.num_seqs, dtype=np.int32)
    if not batch.others and (found := prefix.groups(batch, seqs, page)) is not None:
        rows, counts, keys = found
        common[seqs[rows]] = np.repeat(keys, counts)
        leader[seqs[rows]] = np.repeat(seqs[rows[np.cumsum(counts) - counts]], counts)
    return common, leader


def latent_rows(batch: HostBatch, single: I32, rows: int, page: int) -> tuple[I32, list[I32], int, int]:
    """Tiles of `rows` query rows that are expanded; and fields of latent.Rows, one after another."""
    lengths = np.diff(batch.cu_q)
    common, leader = shared_by(batch, np.flatnonzero(lengths >= latent.FEW_SHARED).astype(np.int32), page)
    expanded = (lengths > latent.FEW) | (common > 0)
    few = tiles(np.where((lengths > 1) & ~expanded, lengths, 0), latent.TOKENS)
    seqs = np.unique(few[:, 0])
    tokens = [batch.cu_q[single], *(np.arange(batch.cu_q[s], batch.cu_q[s + 1], dtype=np.int32) for s in seqs)]
    before = np.cumsum(lengths[seqs]) - lengths[seqs]
    place = before[np.searchsorted(seqs, few[:, 0])] + few[:, 1]
    own = np.flatnonzero(expanded)
    first = own[(common[own] > 0) & (leader[own] == own)]
    begin, end = np.concatenate([0 * first, common[own]]), np.concatenate([common[first], batch.kv_len[own]])
    at, starts = np.cumsum(end - begin) - (end - begin), np.zeros((batch.num_seqs, 3), np.int32)
    starts[first, 1] = at[: len(first)]
    starts[:, 0], starts[:, 1], starts[own, 2] = common, starts[leader, 1], at[len(first) :] - common[own]
    runs = np.column_stack([np.concatenate([first, own]), begin, end, at]).astype(np.int32)
    fields = [np.concatenate(tokens), np.column_stack([few, place]).astype(np.int32), runs, starts]
    wide = tiles(np.where(expanded, lengths, 0), rows)
    return wide, fields, int((end - begin).sum()), int((end - begin).max(initial=0))


def upload(
    batch: HostBatch, page: int, rows: int, splits: int, device: torch.device, absorb: bool = False
) -> tuple[GpuMeta, torch.Tensor]:
    """The batch on the device with prefill tiles of `rows` query rows, and from_prev [T]. With `absorb`, latent
    attention may absorb: it has no tiles for short prefills."""
    lengths = np.diff(batch.cu_q)
    single = np.flatnonzero(lengths == 1).astype(np.int32)
    wide, fields, keys, longest = tiles(np.where(lengths > 1, lengths, 0), rows), [single[:0]] * 4, 0, 0
    if absorb:
        wide, fields, keys, longest = latent_rows(batch, single, rows, page)
    tables, common = batch.by_group, []
    pages, (starts, *_) = zip(*(flat_pages(table, page) for table in tables), strict=True)
    parts = [batch.tokens, batch.positions, batch.from_prev, batch.last, batch.cu_q, batch.kv_len, starts, single]
    parts += [wide, *fields]
    for table, flat in zip(tables, pages, strict=True):
        common.append(prefix.plan(table, single, page, len(single), absorb))
        parts += [table.slots, flat, single[:0] if common[-1] is None else common[-1]]
    whole = pinned(parts, device).to(device, non_blocking=True).split([p.size for p in parts])
    tokens, positions, source, last, cu_q, kv_len, start, one, tile, absorbed, few, runs, begin, *each = whole
    which = latent.Rows(absorbed, few.view(-1, 3), runs.view(-1, 4), begin.view(-1, 3), keys, longest)
    metas = []
    for plan, slots, flat, shared in zip(common, each[::3], each[1::3], each[2::3], strict=True):
        view = None if plan is None else prefix.view(shared, len(one), len(one))
        paged = Paged(cu_q, kv_len, start, flat, one, splits, tile.view(-1, 2), view)
        metas.append(GpuMeta(tokens, positions, slots, last, paged, which, int(batch.kv_len.max())))
    return replace(metas[0], others=tuple(metas[1:])), source
