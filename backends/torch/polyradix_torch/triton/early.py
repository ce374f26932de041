"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits before it reads or writes.

Every kernel that is launched with `early(...)` calls `start(EARLY)` before its first load of what another kernel may
have written, and before its first store: until then the kernel before it may still read what is to be overwritten.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def start(EARLY: tl.constexpr):
    """Lets the next kernel start, and waits until all that the kernels before wrote can be read."""
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@cache
def early(device: torch.device) -> dict[str, Any]:
    """Options of a launch: on where the chip has it, which is from Hopper on."""
    if device.type == "cpu":
        return {"EARLY": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 90:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
