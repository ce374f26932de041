"""A device in trouble, in the contract's words. `device` is torch.cuda, or another device's module with its names."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from polyradix.backend.capabilities import DeviceLost

P = ParamSpec("P")
T = TypeVar("T")
CALLS = ("pack", "alloc_kv", "prepare", "sample", "logprobs", "copy_pages", "export_pages", "import_pages", "fetch")


def told(device: Any, call: Callable[P, T]) -> Callable[P, T]:
    """`call`, raising MemoryError when the device has no room and DeviceLost when it answers no more. An error that
    cannot be got over is told again by every later call."""

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise MemoryError(_first_line(error)) from error
        except RuntimeError as error:
            try:
                device.synchronize()
            except RuntimeError as again:
                raise DeviceLost(_first_line(again)) from error
            raise

    return guarded


def all_told(device: Any) -> Callable[[type[T]], type[T]]:
    """Every call of the contract that uses the device, of a class and of those it inherits from."""

    def decorate(backend: type[T]) -> type[T]:
        for name in CALLS:
            setattr(backend, name, told(device, getattr(backend, name)))
        return backend

    return decorate


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
