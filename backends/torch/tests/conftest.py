from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch

sys.path.insert(0, str(Path(__file__).parent))

from plain_backend import PlainBackend


@pytest.fixture
def backend() -> PlainBackend:
    torch.manual_seed(0)
    return PlainBackend()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def make_batch(parts: list[tuple[int, int, list[int]]], page_size: int, prev: list[int] | None = None) -> HostBatch:
    """A batch of sequences (tokens cached before, new tokens, page ids); token ids are the positions."""
    width = max(len(pages) for _, _, pages in parts)
    positions = np.concatenate([np.arange(done, done + n) for done, n, _ in parts]).astype(np.int32)
    slots = [pages[p // page_size] * page_size + p % page_size for d, n, pages in parts for p in range(d, d + n)]
    cu_q = np.cumsum([0] + [n for _, n, _ in parts]).astype(np.int32)
    return HostBatch(
        tokens=positions,
        positions=positions,
        slots=np.array(slots, np.int32),
        cu_q=cu_q,
        kv_len=np.array([done + n for done, n, _ in parts], np.int32),
        pages=np.array([pages + [0] * (width - len(pages)) for _, _, pages in parts], np.int32),
        last=cu_q[1:] - 1,
        from_prev=np.array(prev if prev is not None else [-1] * len(positions), np.int32),
    )


@pytest.fixture
def batch_of():
    return make_batch
