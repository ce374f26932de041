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


def tiles(batch: HostBatch, rows: int, least: int = 2, most: int = 1 << 31) -> I32:
    """[n,2]: (sequence, first row) of every tile of `rows` query rows, for sequences of `least` to `most` of them."""
    lengths = np.diff(batch.cu_q)
    counts = np.where((lengths >= least) & (lengths <= most), -(-lengths // rows), 0)
    seqs = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([seqs, first * rows], axis=1).astype(np.int32)


def latent_rows(batch: HostBatch, single: I32) -> tuple[list[I32], int, int]:
    """Fields of latent.Rows, one after another."""
    few = tiles(batch, latent.TOKENS, most=latent.FEW)
    lengths, starts = np.diff(batch.cu_q), np.zeros(batch.num_seqs, np.int32)
    seqs = np.unique(few[:, 0])
    tokens = [batch.cu_q[single], *(np.arange(batch.cu_q[s], batch.cu_q[s + 1], dtype=np.int32) for s in seqs)]
    before = len(single) + np.cumsum(lengths[seqs]) - lengths[seqs]
    place = before[np.searchsorted(seqs, few[:, 0])] + few[:, 1]
    wide = np.flatnonzero(lengths > latent.FEW).astype(np.int32)
    keys = batch.kv_len[wide]
    starts[wide] = np.cumsum(keys) - keys
    fields = [np.concatenate(tokens), np.column_stack([few, place]).astype(np.int32), wide, starts]
    return fields, int(keys.sum()), int(keys.max(initial=0))


def upload(
    batch: HostBatch, page: int, rows: int, splits: int, device: torch.device, absorb: bool = False
) -> tuple[GpuMeta, torch.Tensor]:
    """The batch on the device with prefill tiles of `rows` query rows, and from_prev [T]. With `absorb`, latent
    attention may absorb: it has no tiles for short prefills, and no keys are read once for many sequences."""
    single = np.flatnonzero(np.diff(batch.cu_q) == 1).astype(np.int32)
    fields, keys, longest = latent_rows(batch, single) if absorb else ([single[:0]] * 4, 0, 0)
    starts = flat_pages(batch, page)[1]
    parts = [batch.tokens, batch.positions, batch.from_prev, batch.last, batch.cu_q, batch.kv_len, starts, single]
    parts += [tiles(batch, rows, latent.FEW + 1 if absorb else 2), *fields]
    tables, common = batch.by_group, []
    for table in tables:
        common.append(None if absorb else prefix.plan(table, single, page, len(single)))
        parts += [table.slots, flat_pages(table, page)[0], single[:0] if common[-1] is None else common[-1]]
    whole = pinned(parts, device).to(device, non_blocking=True).split([p.size for p in parts])
    tokens, positions, source, last, cu_q, kv_len, start, one, tile, absorbed, few, wide, begin, *each = whole
    which = latent.Rows(absorbed, few.view(-1, 3), wide, begin, keys, longest)
    metas = []
    for plan, slots, flat, shared in zip(common, each[::3], each[1::3], each[2::3], strict=True):
        view = None if plan is None else prefix.view(shared, len(one), len(one))
        paged = Paged(cu_q, kv_len, start, flat, one, splits, tile.view(-1, 2), view)
        metas.append(GpuMeta(tokens, positions, slots, last, paged, which, int(batch.kv_len.max())))
    return replace(metas[0], others=tuple(metas[1:])), source
