"""Ahead-of-time compilation by the real TPU compiler, on any machine: `python -m polyradix_tpu.aot`.

Needs libtpu (the extra `aot`), which is Google's and proprietary. Nothing is executed on a TPU: what the compiler
accepts, how many bytes it plans and which instructions it emits are known; times, bandwidth and on-chip numerics not.
"""
