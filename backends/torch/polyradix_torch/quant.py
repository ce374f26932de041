"""Weights kept quantised, in plain torch: every product makes the weight anew, which saves memory and costs time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyradix.backend.protocol import Quant

Product = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor, torch.Tensor | None], Product]


@dataclass(frozen=True)
class Codes:
    """The parts of a weight [..., out, in], as Quant has them."""

    quant: Quant
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, expert: int) -> Codes:
        zero = None if self.zero is None else self.zero[expert]
        return Codes(self.quant, self.codes[expert], self.scale[expert], zero)

    def weight(self) -> torch.Tensor:
        """float32"""
        codes = self.codes
        if self.quant.format == "int4":
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        value = codes.float()
        if self.zero is not None:
            value = value - self._spread(self.zero.float(), value)
        return value * self._spread(self.scale, value)

    def _spread(self, blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Each block's number for every row and column of it."""
        rows, columns = self.quant.block
        out, width = like.shape[-2:]
        tall = blocks.repeat_interleave(min(rows, out), -2)[..., :out, :]
        return tall.repeat_interleave(min(columns, width), -1)[..., :width]


class QuantLinear:
    """[T,in] -> [T,out]; `linear` makes a product of a weight and a bias."""

    def __init__(self, codes: Codes, bias: torch.Tensor | None, dtype: torch.dtype, linear: Make) -> None:
        self.codes, self.bias, self._dtype, self._linear = codes, bias, dtype, linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(self.codes.weight().to(self._dtype), self.bias)(x)
