"""Makes Triton's interpreter compute bfloat16 and float16 as hardware does, and refuse foreign addresses.

The stock interpreter works on the bits of bfloat16 as if they were integers, truncates casts to it, and reads and
writes any address. Made for Triton 3.6 to 3.9. Not seen: an overrun into another argument of the same launch.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

HALVES = {tl.bfloat16: ml_dtypes.bfloat16, tl.float16: np.float16}
STOCK = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot")}


def _wide(x: TensorHandle) -> TensorHandle:
    """Halves as float32, which is exact; others as they are."""
    kind = HALVES.get(x.dtype.scalar)
    return x if kind is None else TensorHandle(x.data.view(kind).astype(np.float32), tl.float32)


def _rounded(data: Any, kind: Any) -> TensorHandle:
    """To the nearest, ties to even."""
    data = np.asarray(data, np.float32).astype(HALVES[kind])
    return TensorHandle(data.view(np.uint16) if kind is tl.bfloat16 else data, kind)


def _cast(self: Any, x: TensorHandle, to: Any) -> TensorHandle:
    x = _wide(x)
    return _rounded(x.data, to.scalar) if to.scalar in HALVES else STOCK["cast_impl"](self, x, to)


def _convert(self: Any, x: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("a cast that rounds towards zero")
    return _cast(self, x, to)


def _binary(self: Any, a: TensorHandle, b: TensorHandle, op: Any) -> TensorHandle:
    kind = a.dtype.scalar
    if kind not in HALVES or a.data.dtype == bool:
        return STOCK["binary_op"](self, a, b, op)
    out = op(_wide(a).data, _wide(b).data)
    return TensorHandle(out, tl.int1) if out.dtype == bool else _rounded(out, kind)


def _unary(self: Any, x: TensorHandle, op: Any) -> TensorHandle:
    kind = x.dtype.scalar
    return _rounded(op(_wide(x).data), kind) if kind in HALVES else STOCK["unary_op"](self, x, op)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return STOCK["create_dot"](self, _wide(a), _wide(b), *rest)


class Extents:
    """The bytes of every tensor argument of the launch that runs."""

    def __init__(self) -> None:
        self.low, self.high = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def record(self, tensors: list[Any]) -> None:
        self.low = np.array([x.data_ptr() for x in tensors], np.uint64)
        last = [sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        self.high = self.low + np.array(
            [(n + 1) * x.element_size() for n, x in zip(last, tensors, strict=True)], np.uint64
        )

    def check(self, what: str, pointers: TensorHandle, mask: Any) -> None:
        """Raises IndexError where an unmasked address is in no tensor."""
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, np.shape(mask)))[mask]
        if not at.size:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if ((at.min() >= self.low) & (at.max() + size <= self.high)).any():
            return
        inside = ((at[:, None] >= self.low) & (at[:, None] + size <= self.high)).any(1)
        if not inside.all():
            raise IndexError(f"{what} of {int((~inside).sum())} addresses outside every tensor of the launch")


def install(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone."""
    extents = Extents()
    arguments, call = GridExecutor._init_args_hst, GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        host = arguments(self, args, kwargs)
        given = [getattr(x, "base", x) for x in (*host[0], *host[1].values())]  # of a tensor descriptor, its tensor
        extents.record([x for x in given if hasattr(x, "data_ptr") and x.numel()])
        return host

    def quiet(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):  # infinities and NaNs are as legal in a kernel as on hardware
            return call(self, *args, **kwargs)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        extents.check("load", pointers, mask.data)
        return load(self, pointers, mask, *rest, **kwargs)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        extents.check("store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest, **kwargs)

    patch.setattr(GridExecutor, "_init_args_hst", init)
    patch.setattr(GridExecutor, "__call__", quiet)
    patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    for name, mine in {"cast_impl": _cast, "create_fp_to_fp": _convert, "create_dot": _dot}.items():
        patch.setattr(InterpreterBuilder, name, mine)
    patch.setattr(InterpreterBuilder, "binary_op", _binary)
    patch.setattr(InterpreterBuilder, "unary_op", _unary)
