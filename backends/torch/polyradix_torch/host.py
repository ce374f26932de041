"""Between NumPy and torch, bfloat16 and float8 included (ml_dtypes' on the NumPy side)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import HostArray

T = TypeVar("T")
_BITS = {np.int16: torch.int16, np.uint8: torch.uint8}
_VIEWS: dict[Any, tuple[Any, torch.dtype]] = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}


def torch_dtype(name: str) -> Any:
    """The torch dtype of a contract dtype. Raises Unsupported for any other name."""
    if name not in ("float32", "bfloat16"):
        raise Unsupported(f"dtype {name}", "expected float32 or bfloat16")
    return getattr(torch, name)


def kv_dtype(name: str) -> torch.dtype:
    """As torch_dtype, of what a cache may also hold."""
    return torch.float8_e4m3fn if name == "float8_e4m3fn" else torch_dtype(name)


def movable(x: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that torch copies by index: float8 as its bits."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def to_torch(x: HostArray, device: str = "cpu") -> torch.Tensor:
    """A copy on `device` that shares no memory with `x`, of the same shape and dtype."""
    own = np.array(x, order="C") if device == "cpu" else np.ascontiguousarray(x)
    if own.dtype in _VIEWS:
        bits, dtype = _VIEWS[own.dtype]
        return torch.from_numpy(own.view(bits)).view(dtype).to(device)
    return torch.from_numpy(own).to(device)


def to_numpy(x: torch.Tensor) -> HostArray:
    """The values of `x` on the host; shares memory with a tensor that is there already."""
    host = x.detach().cpu().contiguous()
    for kind, (bits, dtype) in _VIEWS.items():
        if host.dtype == dtype:
            return np.asarray(host.view(_BITS[bits]).numpy()).view(kind)
    return np.asarray(host.numpy())


def done(value: T) -> Future[T]:
    """A future that holds `value` already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future
