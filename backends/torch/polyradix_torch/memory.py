"""What a device's memory has left, by torch's own count. `device` is torch.cuda, or a module with its names."""

from __future__ import annotations

from typing import Any

from polyradix.backend.protocol import Memory


def remaining(device: Any, index: Any, still: int | None) -> Memory:
    """Free is what the driver has and what torch keeps unused, less what the steps needed since weights and cache alone
    took `still` bytes; None before there is a cache."""
    free, total = device.mem_get_info(index)
    kept = device.memory_reserved(index) - device.memory_allocated(index)
    steps = 0 if still is None else device.max_memory_allocated(index) - still
    return Memory(free=free + kept - steps, total=total)


def settled(device: Any, index: Any) -> int:
    """Bytes that are taken now; from here on steps are measured."""
    device.reset_peak_memory_stats(index)
    taken: int = device.memory_allocated(index)
    return taken
