from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels import grouped_matmul as grouped
from polyradix_tpu.kernels.grouped_matmul import Blocks, kernel, reference

CHECKED = pltpu.InterpretParams(detect_races=True)
EAGER = pltpu.InterpretParams(dma_execution_mode="eager")
BLOCKS = Blocks(32, 16, 128)
BOUND = {"bfloat16": {"rtol": 2**-8, "atol": 1e-5}, "float32": {"rtol": 1e-5, "atol": 1e-5}}
SIZES = {
    "empty groups, and ends inside tiles": [0, 5, 16, 0, 1, 42, 0, 2],
    "ends where parts and tiles end": [16, 16, 32, 0],
    "one group over all tiles": [90],
    "no rows": [],
    "rows in the last group alone": [0, 0, 0, 0, 0, 0, 0, 3],
}


def pallas(mode):
    return jax.jit(partial(grouped.grouped_matmul, blocks=BLOCKS, interpret=mode))


checked = pallas(CHECKED)


def check(f, sizes, dtype, rows=90):
    """`f` on seeded values, NaN in the rows that no group has."""
    sizes = sizes + [0] * (8 - len(sizes))
    rng = np.random.default_rng(sum(sizes))
    lhs, rhs = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, 128), (len(sizes), 200, 128)))
    lhs = lhs.at[sum(sizes) :].set(np.nan)
    out = f(lhs, rhs, jnp.asarray(sizes, np.int32))
    assert out.dtype == lhs.dtype
    np.testing.assert_allclose(np.asarray(out, float), reference.grouped_matmul(lhs, rhs, sizes), **BOUND[dtype])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", BOUND)
def test_plain_xla(sizes, dtype):
    check(grouped.xla, sizes, dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernel(races, sizes):
    check(checked, sizes, "float32")
    assert not races()


@pytest.mark.parametrize(("rows", "mode"), [(70, CHECKED), (64, EAGER)])
def test_kernel_in_bfloat16(races, capfd, rows, mode):
    check(pallas(mode), [3, 0, 40, 17], "bfloat16", rows)
    assert "Semaphore" not in capfd.readouterr().out  # that is not zero at the end
    assert mode is EAGER or not races()


@pytest.mark.parametrize("field", ["first", "group"])
def test_a_wrong_plan_is_noticed(wrong_plan, field):
    wrong_plan(kernel, field)
    with pytest.raises(AssertionError, match="Not equal"):
        check(pallas(pltpu.InterpretParams()), SIZES["empty groups, and ends inside tiles"], "float32")


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {
    "lhs": struct(64, 256),
    "rhs": struct(4, 384, 256),
    "sizes": struct(4, dtype="int32"),
    "blocks": Blocks(128, 64, 256),
}
BAD = [
    ({"lhs": struct(64)}, "lhs's shape is (64,); expected [M,K]"),
    ({"rhs": struct(4, 0, 256)}, "rhs's shape is (4, 0, 256); expected [E,N,K]"),
    ({"rhs": struct(4, 384, 128)}, "rhs's last axis is 128; expected 256"),
    ({"lhs": struct(64, 192), "rhs": struct(4, 384, 192)}, "K is 192; expected a multiple of 128"),
    ({"sizes": struct(5, dtype="int32")}, "group_sizes' shape is (5,); expected (4,)"),
    ({"sizes": struct(4, dtype="int8")}, "group_sizes' dtype is int8; expected int32"),
    ({"lhs": struct(64, 256, dtype="float16")}, "dtypes is (dtype('float16'), dtype(bfloat16)); expected one of"),
    ({"blocks": Blocks(128, 8, 256)}, "part is 8; expected a multiple of 16"),
    ({"blocks": Blocks(96, 64, 256)}, "rows is 96; expected a multiple of 64"),
    ({"blocks": Blocks(128, 64, 64)}, "columns is 64; expected a multiple of 128"),
    ({"blocks": Blocks(1 << 16, 64, 256)}, "VMEM for Blocks(rows=65536, part=64, columns=256) is "),
    (
        {"lhs": struct(1 << 22, 256), "blocks": Blocks(64, 64, 256)},
        "bytes of the plan is 1048640; expected at most 524288",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_the_kernel_does_not_take(change, message):
    assert grouped.problems(*GOOD.values()) == []
    assert any(found.startswith(message) for found in grouped.problems(*{**GOOD, **change}.values()))


def test_a_refused_call_says_why():
    with pytest.raises(ValueError, match="K is 96; expected a multiple of 128"):
        grouped.grouped_matmul(jnp.zeros((8, 96)), jnp.zeros((2, 8, 96)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("inner", [128, 2048, 14336, 1 << 16])
def test_blocks_that_fit_whatever_the_weights(inner):
    lhs, rhs = struct(1 << 16, inner, dtype="float32"), struct(8, 4096, inner, dtype="float32")
    found = grouped.problems(lhs, rhs, struct(8, dtype="int32"), grouped.choose(lhs, rhs))
    assert [x.split(" is ")[0].split("(")[0] for x in found] == (["VMEM for Blocks"] if inner == 1 << 16 else [])
