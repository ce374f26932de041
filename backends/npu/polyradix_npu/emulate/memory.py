"""Host memory and device memory, which here are one: a device tensor as a CPU tensor, and back."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Device = torch.device


def on_device(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def alias(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor; as it is if it is one already. Lives no longer than `x` does."""
    if not on_device(x):
        return x
    storage = x.untyped_storage()
    size = storage.nbytes() // x.itemsize
    if not size:
        return torch.empty(x.shape, dtype=x.dtype)
    whole = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(whole, dtype=x.dtype, count=size).as_strided(x.shape, x.stride(), x.storage_offset())


def upload(x: torch.Tensor) -> torch.Tensor:
    """A copy on the device, of the same shape, strides and dtype."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu:0")
    alias(out).copy_(x)
    return out


def aliased(tree: Any) -> Any:
    """Every tensor of `tree` as a CPU tensor, and every device as the CPU."""
    tree = tree_map_only(torch.Tensor, alias, tree)
    return tree_map_only(Device, lambda _: Device("cpu"), tree)
