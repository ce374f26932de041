"""Polyradix on Ascend NPUs. Importing this imports no torch; that waits for `entry.create`."""

from polyradix_npu.device import Entry

__all__ = ["entry"]

entry = Entry()
