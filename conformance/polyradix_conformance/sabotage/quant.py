"""Quantised weights that are misread."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import HostArray, ParamPart, ParamSpec, Quant, Reader
from polyradix_conformance.sabotage import sabotage

LINEAR = "L1/quant/linear/"


class Misread(NumpyBackend):
    """The parts of a quantised weight, changed on their way."""

    def pack(self, spec: ParamSpec, read: Reader) -> Any:
        quant = spec.quant
        if quant is None:
            return super().pack(spec, read)

        def changed(part: ParamPart = "weight") -> HostArray:
            out: HostArray = getattr(self, f"_{part}", lambda x, quant: x)(read(part), quant)
            return out

        return super().pack(spec, changed)


@sabotage(f"{LINEAR}fp8-block/")
class ScalesTransposed(Misread):
    """The grid of blocks is taken column by column."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return x.swapaxes(-1, -2).reshape(x.shape)


@sabotage(f"{LINEAR}fp8-block/")
class ScaleOfTheFirstColumn(Misread):
    """All blocks of a row have the scale of its first one."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return np.broadcast_to(x[..., :1], x.shape)


@sabotage(f"{LINEAR}fp8-channel/")
class ScaleOfTheTensor(Misread):
    """A weight has one scale, that of its first block."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return np.broadcast_to(x[..., :1, :1], x.shape)


@sabotage("L1/quant/moe/")
class ScalesOfTheFirstExpert(Misread):
    """All experts have the scales of the first one."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return np.broadcast_to(x[:1], x.shape) if x.ndim == 3 else x


@sabotage("L1/quant/moe/")
class ScaleOfGateForUp(Misread):
    """The up rows of experts have the scales of the gate rows."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        half = x.shape[-2] // 2
        return np.concatenate([x[..., :half, :], x[..., : x.shape[-2] - half, :]], axis=-2) if x.ndim == 3 else x


@sabotage(f"{LINEAR}fp8-block/")
class BlocksOfHalfTheRows(Misread):
    """A block has half as many rows as it says."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return x[..., np.minimum(np.arange(x.shape[-2]) * 2, x.shape[-2] - 1), :] if quant.block[0] > 1 else x


@sabotage(f"{LINEAR}fp8-block/")
class ScaleDivides(Misread):
    """The scale is taken for its inverse."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return 1 / x


@sabotage(f"{LINEAR}fp8-block/")
class ScalesNarrow(Misread):
    """Scales are rounded to powers of two."""

    def _scale(self, x: Any, quant: Quant) -> Any:
        return np.exp2(np.round(np.log2(x)))


@sabotage(f"{LINEAR}fp8-block/")
class CodesOfTheOtherFloat8(Misread):
    """Codes are read as float8_e4m3fnuz."""

    def _weight(self, x: Any, quant: Quant) -> Any:
        return x.view(ml_dtypes.float8_e4m3fnuz) if quant.format == "fp8" else x


@sabotage(f"{LINEAR}int4-group-64/")
class NibblesSwapped(Misread):
    """The even column is taken from the high nibble."""

    def _weight(self, x: Any, quant: Quant) -> Any:
        return x << 4 | x >> 4 if quant.format == "int4" else x


@sabotage(f"{LINEAR}int4-group-64/")
class ZeroOffByOne(Misread):
    """Zero points are one too large."""

    def _zero(self, x: Any, quant: Quant) -> Any:
        return x + 1


@sabotage(f"{LINEAR}int4-group-64/")
class ZeroInTheMiddle(Misread):
    """Every zero point is 8."""

    def _zero(self, x: Any, quant: Quant) -> Any:
        return np.full_like(x, 8)


@sabotage(f"{LINEAR}int4-group-64/")
class CodesSigned(Misread):
    """The highest bit of a code counts the other way round."""

    def _weight(self, x: Any, quant: Quant) -> Any:
        return x ^ 0x88 if quant.format == "int4" else x
