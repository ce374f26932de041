"""A GPU in trouble, in the contract's words."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from polyradix.backend.capabilities import DeviceLost

P = ParamSpec("P")
T = TypeVar("T")
CALLS = ("pack", "alloc_kv", "prepare", "sample", "logprobs", "copy_pages", "export_pages", "import_pages", "fetch")


def told(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, raising MemoryError when the GPU has no room and DeviceLost when it answers no more. A CUDA error that
    cannot be got over is told again by every later call."""

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise MemoryError(_first_line(error)) from error
        except RuntimeError as error:
            try:
                torch.cuda.synchronize()
            except RuntimeError as again:
                raise DeviceLost(_first_line(again)) from error
            raise

    return guarded


def all_told(backend: type[T]) -> type[T]:
    """Every call of the contract that uses the GPU."""
    for name in CALLS:
        setattr(backend, name, told(getattr(backend, name)))
    return backend


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
