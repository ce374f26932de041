from __future__ import annotations

import json
import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_tpu.batch import Shape
from polyradix_tpu.kernels import AUTO, PALLAS, XLA, choose
from polyradix_tpu.kernels.ragged_paged_attention import problems, validate

DECODE, MIXED = Shape(64, 64, 256, 1), Shape(1024, 64, 256, 128)


def found(heads=(8, 2, 128), page=16, rows=4, width=128, dtype="bfloat16", cache="bfloat16", shape=MIXED, q=None):
    a = AttnSpec(Heads(*heads), 1.0)
    q = jax.ShapeDtypeStruct((shape.tokens, *(q or (heads[0], heads[2]))), dtype)
    return "; ".join(problems(q, jax.ShapeDtypeStruct((99, page, rows, width), jnp.dtype(cache)), shape, a))


def test_serving_shapes_are_taken():
    assert found() == found(shape=DECODE) == ""
    assert found((8, 4, 256), rows=8, width=256) == found((8, 2, 80)) == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"q": (4, 128)}, r"q's shape is \(1024, 4, 128\); expected \(T, 8, 128\)"),
        ({"rows": 8}, r"rows of a slot is 8; expected 2 \* 2"),
        ({"heads": (7, 2, 128)}, "query heads is 7; expected a multiple of 2"),
        ({"dtype": "float32"}, r"dtypes is \('float32', 'bfloat16'\); expected one of"),
        ({"dtype": "float16", "cache": "float16"}, "dtypes is"),
        ({"width": 64}, "head_dim in the cache is 64; expected 128 to 128, or 256"),
        ({"heads": (8, 2, 64), "width": 64}, "head_dim in the cache is 64; expected a multiple of 128"),
        ({"page": 24}, "page is 24; expected 8, 16, 32, 64 or 128"),
        ({"heads": (9, 3, 128), "rows": 6}, "rows of a slot is 6; expected a multiple of 8, or 2 or 4"),
        (
            {"heads": (8, 2, 256), "width": 256},
            "rows of a slot is 4; expected a multiple of 8, or 2 or 4 with head_dim",
        ),
        ({"shape": Shape(64, 64, 4096, 1)}, "bytes of page table and items is .*; expected at most 524288"),
        ({"heads": (128, 8, 128), "rows": 16}, "VMEM for tiles of 128 is .*; expected at most 50331648"),
    ],
)
def test_what_is_not_taken_is_named(wrong, said):
    assert re.match(said, found(**wrong))


def test_blocks_of_every_chip_are_whole_pages_and_lanes(monkeypatch):
    table = json.loads(validate.BLOCKS.read_text())
    heads, pages, dtypes = (1, 2, 4, 5, 8, 12, 32), (8, 16, 32, 64, 128), ("bfloat16", "float32")
    for chip, kv_heads, page, dtype, shape in product(table.values(), heads, pages, dtypes, (DECODE, MIXED)):
        monkeypatch.setattr(validate, "tuned", lambda _, chip=chip: chip)
        cache = jax.ShapeDtypeStruct((9, page, 2 * kv_heads, 128), jnp.dtype(dtype))
        z, _ = validate.plan(cache, shape, AttnSpec(Heads(kv_heads, kv_heads, 128), 1.0), shape.tile)
        assert z.tokens % page == z.columns % z.chunk == z.chunk % 128 == 0
        assert (shape.seqs if shape.tile == 1 else shape.tiles) % (z.items * z.cores) == 0


def test_the_choice_of_kernels():
    assert choose("auto", on_tpu=True) is AUTO
    assert choose("auto", on_tpu=False) is choose("xla", on_tpu=True) is XLA
    assert choose("pallas", on_tpu=True) is PALLAS
    assert choose("pallas", on_tpu=False).name == "Pallas, interpreted"
    with pytest.raises(ValueError, match="kernels is 'triton'; expected one of auto, pallas, xla"):
        choose("triton", on_tpu=True)


def test_a_shape_that_pallas_refuses_goes_to_xla(case):
    heads = Heads(6, 3, 64)
    c = case([1, 9], [17, 20], heads, 16, "float32")
    np.testing.assert_allclose(*c.attend(AUTO.attend, AttnSpec(heads, 0.125)), rtol=0, atol=5e-6)
    np.testing.assert_array_equal(*c.write(AUTO.write))
    with pytest.raises(ValueError, match="rows of a slot is 6"):
        c.attend(PALLAS.attend, AttnSpec(heads, 0.125))
