"""Host memory and device memory, which here are one: a device tensor as a CPU tensor, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

Device = torch.device
HOST = Device("cpu")


def on_device(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def alias(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor; as it is if it is one already. Lives no longer than `x` does."""
    if not on_device(x):
        return x
    storage = x.untyped_storage()
    place, form = (storage.data_ptr(), storage.nbytes()), (x.shape, x.stride(), x.storage_offset())
    return _seen_from_host(*place, x.dtype, *form, torch.is_inference_mode_enabled())


@lru_cache(1 << 14)
def _seen_from_host(
    address: int, size: int, dtype: torch.dtype, shape: Any, strides: Any, offset: int, inference: bool
) -> torch.Tensor:
    """Of all tensors that are ever there: it owns no memory. Tensors remember the mode that they are made in, hence
    `inference`."""
    if size < dtype.itemsize:
        return torch.empty(shape, dtype=dtype)
    whole = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(whole, dtype=dtype, count=size // dtype.itemsize).as_strided(shape, strides, offset)


def upload(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device, of the same shape, strides and dtype."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu:0")
    alias(out).copy_(x)
    return out


def aliased(tree: Any) -> Any:
    """Every tensor of `tree` as a CPU tensor, and every device as the CPU."""
    return each(tree, lambda x: alias(x) if isinstance(x, torch.Tensor) else HOST if isinstance(x, Device) else x)


def each(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """`tree` of tuples, lists and dicts with fn of every leaf."""
    if isinstance(tree, dict):
        return {name: each(value, fn) for name, value in tree.items()}
    return type(tree)(each(x, fn) for x in tree) if type(tree) in (tuple, list) else fn(tree)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        yield tree
        return
    for x in tree:
        yield from leaves(x)
