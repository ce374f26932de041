"""On a GPU: every bfloat16 into a cache of float8 and, through attention over a single key, out of it again."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_conformance.inputs import Part, Ragged
from polyradix_torch.triton import attention
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.upload import upload

DEVICE = torch.device("cuda", 0)
WIDTH = 256  # columns of a head


@pytest.mark.parametrize("tokens", [1, 2])
def test_every_number(tokens: int) -> None:
    """As decodes of one token, and as prefills of two, of which the first sees only itself."""
    x = torch.arange(1 << 16, dtype=torch.int32).short().view(torch.bfloat16).view(-1, 1, WIDTH).to(DEVICE)
    if tokens == 2:
        x[1::2] = x[1::2].nan_to_num(0.0, torch.inf, -torch.inf)  # hidden from the first token, but 0 * NaN is NaN
    ragged = Ragged((tokens,) * (len(x) // tokens), 16)
    batch = ragged.batch([Part(s, 0, tokens) for s in range(len(x) // tokens)])
    meta, _ = upload(batch, 16, attention.tile_rows(WIDTH, 1), 1, DEVICE)
    kv = tuple(torch.zeros(ragged.num_pages, 16, 1, WIDTH, dtype=torch.float8_e4m3fn, device=DEVICE) for _ in "kv")
    zeros = torch.zeros_like(x)
    out, _ = TritonOps().attend(zeros, zeros, x, kv, meta, AttnSpec(Heads(1, 1, WIDTH), 1.0))
    with np.errstate(invalid="ignore"):
        want = x.float().clamp(-448, 448).cpu().numpy().astype(ml_dtypes.float8_e4m3fn)
    held = kv[1].view(torch.uint8).flatten(0, 1)[torch.from_numpy(batch.slots).long().to(DEVICE)]
    np.testing.assert_array_equal(held.cpu().numpy(), want.view(np.uint8))
    alone = slice(0, None, tokens)
    np.testing.assert_array_equal(out[alone].float().cpu().numpy(), want[alone, 0].astype(np.float32))
