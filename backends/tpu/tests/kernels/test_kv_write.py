from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.protocol import Heads
from polyradix_tpu.kernels import kv_write, xla

CHECKED = pltpu.InterpretParams(detect_races=True)
EAGER = pltpu.InterpretParams(dma_execution_mode="eager")
SHAPES = [
    ([1] * 5, [1, 15, 16, 17, 53]),
    ([1, 7, 16, 1, 37], [1, 7, 32, 53, 53]),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("mode", [CHECKED, EAGER])
def test_rows_land_in_their_slots(case, races, capfd, q_len, kv_len, dtype, mode):
    c = case(q_len, kv_len, Heads(4, 2, 64), 16, dtype, width=128)
    np.testing.assert_array_equal(*c.write(kv_write.write, interpret=mode))
    assert mode is EAGER or not races()
    assert "Semaphore" not in capfd.readouterr().out  # that is not zero at the end


def test_xla_writes_the_same(case):
    c = case(*SHAPES[1], Heads(4, 2, 64), 16, "float32", width=128)
    np.testing.assert_array_equal(*c.write(xla.write))


def test_slots_that_only_begin_and_end_like_a_run(case):
    c = case([1] * 8, [20] * 8, Heads(4, 2, 64), 16, "float32")
    slots = np.array([16, 40, 18, 19, 20, 21, 22, 23], np.int32)
    c = replace(c, host=replace(c.host, slots=slots))
    np.testing.assert_array_equal(*c.write(kv_write.write, interpret=CHECKED))


def test_what_the_kernel_does_not_take_is_named(case):
    c = case([1], [20], Heads(4, 3, 64), 16, "float32")
    with pytest.raises(
        ValueError, match=r"head_dim in the cache is 64; expected a multiple of 128; rows of a slot is 6"
    ):
        c.write(kv_write.write)
    assert "rows of a slot is 6; expected 2 * 2" in kv_write.problems(c.k[:, :2], c.kv, True)
    assert "the cache's dtype is float16" in kv_write.problems(c.k, c.kv.astype("float16"), True)[0]
