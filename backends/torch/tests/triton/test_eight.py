"""Caches of float8, interpreted: every number against ml_dtypes, and a prefix hit against a miss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from interpreted_backend import CPU

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_conformance.inputs import Part, Ragged
from polyradix_torch.triton import attention, eight, rows
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.upload import upload

pytestmark = pytest.mark.usefixtures("exact")
HEADS = Heads(2, 1, 64)


def all_bfloat16() -> torch.Tensor:
    """NaN too."""
    return torch.arange(1 << 16, dtype=torch.int32).short().view(torch.bfloat16).view(64, 4, 256)


def ties() -> torch.Tensor:
    """The values halfway between neighbours, float32, and what is next to them on either side."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (codes[1:] + codes[:-1]) / 2
    all_of = np.concatenate([np.nextafter(middle, to) for to in (-np.inf, np.inf)] + [middle, [448, 464, 480, 1e-30]])
    return torch.from_numpy(np.resize(np.concatenate([all_of, -all_of]), (2, 4, 128)).astype(np.float32))


@pytest.mark.parametrize("numbers", [all_bfloat16, ties])
def test_every_number(numbers: Any) -> None:
    """NaN stays NaN, with its sign."""
    x = numbers()
    kv = tuple(torch.zeros(len(x), 1, *x.shape[1:], dtype=torch.float8_e4m3fn) for _ in "kv")
    at = torch.arange(len(x), dtype=torch.int32)
    with np.errstate(invalid="ignore"):
        want = x.float().clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    held = rows.write(x, -x, kv, at)
    for cache, back, bits in zip(kv, held, (want.view(np.uint8), want.view(np.uint8) ^ 128), strict=True):
        np.testing.assert_array_equal(cache.view(torch.uint8).numpy()[:, 0], bits)
        np.testing.assert_array_equal(back.float().numpy(), bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
        assert back.dtype == x.dtype
    assert rows.write(x, -x, kv, at, held=False)[0] is x


def attended(dtype: torch.dtype, *steps: int) -> torch.Tensor:
    """The last output of a sequence that is prefilled up to each of `steps` tokens."""
    ragged, random = Ragged(steps[-1:], 16), torch.Generator().manual_seed(2)
    whole = 3 * torch.randn(steps[-1], HEADS.q + 2 * HEADS.kv, HEADS.dim, generator=random).to(dtype)
    shape = ragged.num_pages, 16, HEADS.kv, HEADS.dim
    kv, out = tuple(torch.zeros(shape, dtype=torch.float8_e4m3fn) for _ in "kv"), whole
    for start, stop in pairwise((0, *steps)):
        meta, _ = upload(ragged.batch([Part(0, start, stop)]), 16, attention.tile_rows(HEADS.dim, 1), 2, CPU)
        q, k, v = whole[start:stop].split([HEADS.q, HEADS.kv, HEADS.kv], dim=1)
        out, _ = TritonOps().attend(q, k, v, kv, meta, AttnSpec(HEADS, 0.125))
    return out


@pytest.mark.parametrize(("dtype", "native"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_prefix_hit_has_the_bits_of_a_miss(dtype: Any, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a step's own are read as the cache holds them. On chips with the type and without; tiles are cut in two
    for float32."""
    monkeypatch.setattr(eight, "_native", lambda device: native)
    monkeypatch.setitem(attention.PREFILL, (4, 64), (32, 8, 32, 32))
    assert torch.equal(attended(dtype, 70, 100), attended(dtype, 100)[70:])
