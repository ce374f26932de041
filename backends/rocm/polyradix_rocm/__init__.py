"""Polyradix on AMD GPUs. Importing this imports no torch; that waits for `entry.create`."""

from polyradix_rocm.device import Entry

__all__ = ["entry"]

entry = Entry()
