"""Makes Triton's interpreter compute bfloat16, float16 and float8 as hardware does, and refuse foreign addresses.

The stock interpreter works on the bits of bfloat16 as if they were integers, truncates casts to it, rounds casts to
float8 wrongly, and reads and writes any address. Made for Triton 3.6 to 3.9. Every pointer is marked with the argument
that it was made of, and may go nowhere else. Not seen: an overrun between the first and the last element of a view.

Triton chooses the interpreter when it is imported, so tests that import this run in a process of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already, without its interpreter: run this folder in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NARROW = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float16: np.float16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
EIGHTS = tl.float8e4nv, tl.float8e4b8  # without infinity, so hardware differs in what is beyond the largest
STOCK = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot")}


def _wide(x: TensorHandle) -> TensorHandle:
    """Narrow floats as float32, which is exact; others as they are."""
    kind = NARROW.get(x.dtype.scalar)
    return x if kind is None else TensorHandle(x.data.view(kind).astype(np.float32), tl.float32)


def _rounded(data: Any, kind: Any) -> TensorHandle:
    """To the nearest, ties to even. Raises OverflowError where that is beyond the largest float8."""
    wide = np.asarray(data, np.float32)
    data = wide.astype(NARROW[kind])
    if kind in EIGHTS and (np.isnan(data) & ~np.isnan(wide)).any():
        raise OverflowError(f"a cast of {np.abs(wide).max()} to {kind}; clamp it first")
    return TensorHandle(data if kind is tl.float16 else data.view(f"u{data.itemsize}"), kind)


def _cast(self: Any, x: TensorHandle, to: Any) -> TensorHandle:
    x = _wide(x)
    return _rounded(x.data, to.scalar) if to.scalar in NARROW else STOCK["cast_impl"](self, x, to)


def _convert(self: Any, x: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("a cast that rounds towards zero")
    return _cast(self, x, to)


def _binary(self: Any, a: TensorHandle, b: TensorHandle, op: Any) -> TensorHandle:
    kind = a.dtype.scalar
    if kind not in NARROW or a.data.dtype == bool:
        return STOCK["binary_op"](self, a, b, op)
    out = op(_wide(a).data, _wide(b).data)
    return TensorHandle(out, tl.int1) if out.dtype == bool else _rounded(out, kind)


def _unary(self: Any, x: TensorHandle, op: Any) -> TensorHandle:
    kind = x.dtype.scalar
    return _rounded(op(_wide(x).data), kind) if kind in NARROW else STOCK["unary_op"](self, x, op)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return STOCK["create_dot"](self, _wide(a), _wide(b), *rest)


MARK = np.uint64(48)  # bits of an address; those above it are the number of the argument it was made of


class Extents:
    """The marked addresses of every tensor argument of the launch that runs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.low, self.high = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def mark(self, tensor: Any, pointer: TensorHandle) -> None:
        pointer.data |= np.uint64(1 + len(self.low)) << MARK
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.low = np.append(self.low, pointer.data)
        self.high = np.append(self.high, pointer.data + np.uint64(size))

    def plain(self, what: str, pointers: TensorHandle, mask: Any) -> TensorHandle:
        """Without marks. Raises IndexError where an unmasked address is not in the tensor that it was made of."""
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, np.shape(mask)))[mask]
        if at.size and not ((at.min() >= self.low) & (at.max() + size <= self.high)).any():
            inside = ((at[..., None] >= self.low) & (at[..., None] + size <= self.high)).any(-1)
            if not inside.all():
                raise IndexError(f"{what} of {int((~inside).sum())} addresses outside their tensor")
        return TensorHandle(pointers.data & ((np.uint64(1) << MARK) - np.uint64(1)), pointers.dtype)


def install(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone."""
    extents = Extents()
    call, convert = GridExecutor.__call__, interpreter._implicit_cvt

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        extents.clear()
        with np.errstate(all="ignore"):  # infinities and NaNs are as legal in a kernel as on hardware
            return call(self, *args, **kwargs)

    def argument(x: Any) -> Any:
        out = convert(x)
        if hasattr(x, "data_ptr"):
            extents.mark(getattr(x, "base", x), out.handle)
        return out

    def check(what: str, pointers: int, mask: int | None) -> None:
        """Method create_`what`, whose pointers and mask have these places among its arguments."""
        stock = getattr(InterpreterBuilder, f"create_{what}")

        def access(self: Any, *args: Any, **kwargs: Any) -> Any:
            plain = extents.plain(what, args[pointers], True if mask is None else args[mask].data)
            return stock(self, *args[:pointers], plain, *args[pointers + 1 :], **kwargs)

        patch.setattr(InterpreterBuilder, f"create_{what}", access)

    patch.setattr(GridExecutor, "__call__", launch)
    patch.setattr(interpreter, "_implicit_cvt", argument)
    check("masked_load", 0, 1)
    check("masked_store", 0, 2)
    check("atomic_rmw", 1, 3)
    check("atomic_cas", 0, None)
    for name, mine in {"cast_impl": _cast, "create_fp_to_fp": _convert, "create_dot": _dot}.items():
        patch.setattr(InterpreterBuilder, name, mine)
    patch.setattr(InterpreterBuilder, "binary_op", _binary)
    patch.setattr(InterpreterBuilder, "unary_op", _unary)


@pytest.fixture
def exact() -> Iterator[None]:
    """The interpreter as `install` patches it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield
