"""Polyradix on NVIDIA GPUs. Importing this imports no torch; that waits for `entry.create`."""

from polyradix_cuda.device import Entry

__all__ = ["entry"]

entry = Entry()
