"""float8 as the chip has it: gfx950 has e4m3fn, as checkpoints do, gfx942 only e4m3fnuz (Noune et al., 2022)."""

from __future__ import annotations

import torch

NAN, MINUS_ZERO = 0x7F, 0x80  # codes of e4m3fn: NaN without its sign; the second is NaN in e4m3fnuz


def to_fnuz(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight e4m3fn of any shape and its float32 scale, as e4m3fnuz: the same bits mean half as much there, so the
    scale doubles. Raises TypeError for another dtype, ValueError for a NaN, whose bits would be +-240."""
    if weight.dtype != torch.float8_e4m3fn:
        raise TypeError(f"weight is {weight.dtype}; expected torch.float8_e4m3fn")
    codes = weight.view(torch.uint8)
    if count := int((codes & NAN == NAN).sum()):
        raise ValueError(f"weight has {count} NaN among {codes.numel()} values; expected none")
    return codes.masked_fill(codes == MINUS_ZERO, 0).view(torch.float8_e4m3fnuz), scale * 2
