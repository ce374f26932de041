"""Polyradix on TPUs, in JAX. Importing this imports no jax; that waits for `entry.create`."""

from polyradix_tpu.device import Entry

__all__ = ["entry"]

entry = Entry()
