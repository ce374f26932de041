"""Caches of float8 that hold other values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from polyradix.backend.numpy.ops import NumpyOps
from polyradix_conformance.sabotage import sabotage


@sabotage("L2/kv_fp8/written")
class Float8Overflows(NumpyOps):
    """What is beyond the largest float8 is NaN in the cache."""

    def _held(self, x: Any, dtype: Any) -> Any:
        with np.errstate(all="ignore"):
            return x.astype(np.float32).astype(dtype)


@sabotage("L2/kv_fp8/written")
class Float8Truncates(NumpyOps):
    """A cache of float8 holds the next value towards zero."""

    def _held(self, x: Any, dtype: Any) -> Any:
        if dtype.itemsize > 1:
            return super()._held(x, dtype)
        near = super()._held(x, dtype)
        bits = near.view(np.uint8)
        return (bits - (np.abs(near.astype(np.float32)) > np.abs(x.astype(np.float32)))).astype(np.uint8).view(dtype)


@sabotage("L1/kv_fp8/whole")
class Float8OfTwoBits(NumpyOps):
    """Values go through float8_e5m2 on their way into a cache of float8_e4m3fn."""

    def _held(self, x: Any, dtype: Any) -> Any:
        narrow = dtype.itemsize == 1
        return super()._held(x.astype(ml_dtypes.float8_e5m2).astype(np.float32) if narrow else x, dtype)
