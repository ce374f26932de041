"""Polyradix on CPUs. Importing this imports no torch; that waits for `entry.create`."""

from polyradix_cpu.device import Entry

__all__ = ["entry"]

entry = Entry()
