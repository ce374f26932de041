"""A cache of float8, which XLA reads and writes, also where Pallas is asked for: attention, and every value."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_tpu import entry
from polyradix_tpu.kernels import xla


def test_case():
    (case,) = (c for c in all_cases() if c.id == "L1/kv_fp8/decode/bfloat16")
    result = run_case(case, lambda tp: entry.create(platform="cpu", kernels="pallas"))
    assert result.status == "pass", result.detail


def test_every_bfloat16_becomes_the_nearest():
    """NaN stays NaN, with its sign."""
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1, 1024)
    kv, m = jnp.zeros((4, 16, 2, 1024), jnp.float8_e4m3fn), SimpleNamespace(slots=np.arange(64))
    held = np.asarray(jax.jit(lambda x: xla.write(x, x, kv, m))(x)).reshape(64, 2, 1024)
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(held.view(np.uint8), want.repeat(2, axis=1).view(np.uint8))
