"""The one kernel of this package: where the keys of decodes lie, token by token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # slots of one program


@triton.jit
def _slots(pages, starts, indptr, out, PAGE, BLOCK: tl.constexpr):
    s, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(indptr + s)
    mine = at < tl.load(indptr + s + 1) - first
    page = tl.load(pages + tl.load(starts + s) + at // PAGE, mask=mine, other=0)
    tl.store(out + first + at, page * PAGE + at % PAGE, mask=mine)


def slots_of(pages: torch.Tensor, starts: torch.Tensor, indptr: torch.Tensor, page: int, most: int) -> torch.Tensor:
    """i32 [S * most], filled up to indptr[S]: the slots of each sequence, whose pages of `page` tokens begin at
    starts[s], and whose tokens are indptr[s+1] - indptr[s], at most `most`. All i32; a launch of fixed shape."""
    out = torch.empty(len(starts) * most, dtype=torch.int32, device=pages.device)
    _slots[(len(starts), triton.cdiv(most, BLOCK))](pages, starts, indptr, out, page, BLOCK)
    return out
