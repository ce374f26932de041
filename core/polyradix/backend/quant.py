"""Quantised weights on the host: their values, and who may be given them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyradix.backend.capabilities import Capabilities, Unsupported
from polyradix.backend.protocol import HostArray, ParamPart, ParamSpec, Quant


def dequantise(quant: Quant, read: Callable[[ParamPart], HostArray]) -> HostArray:
    """The weight that Quant defines, float32; `read` is a Reader."""
    codes = read("weight")
    if quant.format == "int4":
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    value = codes.astype(np.float32)
    if quant.format == "int4":
        value -= _spread(read("zero").astype(np.float32), quant, value)
    value *= _spread(read("scale"), quant, value)
    return value


def check_quant(spec: ParamSpec, caps: Capabilities) -> None:
    """Raises Unsupported for a weight kept in a format that `caps` does not claim."""
    if spec.quant is not None and spec.quant.feature not in caps.features:
        raise Unsupported(spec.quant.feature, f"parameter {spec.name}")


def _spread(blocks: HostArray, quant: Quant, like: HostArray) -> HostArray:
    """Each block's number for every row and column of it."""
    rows, columns = quant.block
    out, width = like.shape[-2:]
    tall = np.repeat(blocks, rows, axis=-2)[..., :out, :]
    wide: HostArray = np.repeat(tall, columns, axis=-1)[..., :width]
    return wide
