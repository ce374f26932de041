"""float8_e4m3fn in kernels, by integers where the chip does not have it; a NaN stays a NaN and keeps its sign.

Source: OCP 8-bit Floating Point Specification 1.0; the exponent has bias 7, that of float32 has 127.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def wide(x, to: tl.constexpr, NAN: tl.constexpr = True):
    """Numbers of any dtype, or as uint8 the bits of float8_e4m3fn -> `to`, exact for bfloat16 and float32. Without NAN
    there must be none: chips without the type take it for 480."""
    out = x
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint32)
        size = bits & 127
        value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        whole = value.to(tl.uint32, bitcast=True)
        whole |= (bits & 128) << 24
        if NAN:
            nan = size + 1 & 128  # no comparison: those of many numbers take many scalar registers
            whole |= (nan << 23) - (nan << 19)
        if to == tl.bfloat16:
            out = (whole >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            out = whole.to(tl.float32, bitcast=True)
    return out.to(to)


@triton.jit
def nearest(x):
    """bfloat16 or float32 -> bits of the nearest float8_e4m3fn, ties to even; of what is beyond 448, those of 448."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    cut = tl.minimum(size, 0x43E00000)  # 448
    normal = (cut + 0x7FFFF + ((cut >> 20) & 1) >> 20) - 960  # 120 exponents
    small = (cut.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # in units of 2^-9
    code = tl.where(cut < 0x3C800000, small, normal)  # 2^-6
    code = tl.where(size > 0x7F800000, 127, code)
    return (code | (bits >> 24 & 128)).to(tl.uint8)


@cache
def _native(device: torch.device) -> bool:
    """Whether the chip converts float8_e4m3fn itself."""
    if device.type == "cpu":
        return False
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 89)


def readable(x: torch.Tensor) -> torch.Tensor:
    """As a kernel reads it with `wide`: float8_e4m3fn as its bits where the chip does not have it."""
    return x if x.dtype != torch.float8_e4m3fn or _native(x.device) else x.view(torch.uint8)
