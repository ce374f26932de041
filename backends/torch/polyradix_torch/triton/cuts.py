"""How kernels are cut on an architecture that needs it otherwise than their tables have it: `tuned/cuts/NAME.json`."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

CUTS = Path(__file__).parent / "tuned/cuts"
T = TypeVar("T")


@cache
def of(device: torch.device) -> dict[str, Any]:
    """What the file says, by kernel; nothing where there is none, and on a CPU."""
    if device.type == "cpu":
        return {}
    target = triton.runtime.driver.active.get_current_target()
    path = CUTS / f"{target.backend}-{target.arch}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def cut(device: torch.device, kernel: str, key: str, usual: T) -> T:
    """The dataclass `usual`, with what the file says otherwise for this kernel and key."""
    return replace(usual, **of(device).get(kernel, {}).get(key, {}))  # type: ignore[type-var]
