from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads
from polyradix_tpu.batch import JaxMeta, Ladder, Shape, pack, unpack
from polyradix_tpu.kernels import mla_attention as mla
from polyradix_tpu.kernels.chip import lanes
from polyradix_tpu.kernels.mla_attention import Blocks, kernel, reference, xla

CHECKED = pltpu.InterpretParams(detect_races=True)
EAGER = pltpu.InterpretParams(dma_execution_mode="eager")
BOUND = {"bfloat16": 2e-2, "float32": 5e-6}
LATENT, ROPE, PAGE, SCALE = 128, 64, 16, 0.07
DECODES = [1] * 6, [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 67]
MIX = [37, 1, 16, 3], [37, 50, 33, 19]


@dataclass
class Latents:
    host: HostBatch
    meta: JaxMeta
    q_latent: Any
    q_rope: Any
    cache: Any

    def check(self, f: Any, **options: Any) -> None:
        args = self.q_latent, self.q_rope, self.cache
        found = f(*args, self.meta, SCALE, lse=True, **options)
        assert [x.dtype for x in found] == [self.cache.dtype, np.float32]
        for x, expected in zip(found, reference.mla_attention(*args, self.host, SCALE), strict=True):
            real = np.asarray(x, float)[: self.host.num_tokens]
            np.testing.assert_allclose(real, expected, rtol=0, atol=BOUND[self.cache.dtype.name])


@pytest.fixture
def latents(case):
    """Seeded values, pages shuffled, and NaN wherever no sequence has a row, and in the columns that are not read."""

    def make(lengths: tuple[list[int], list[int]], heads: int, dtype: str) -> Latents:
        rng = np.random.default_rng(heads)
        host = case(*lengths, Heads(1, 1, 8), PAGE, dtype).host
        shape = Ladder(2).shape(host)
        cache = np.full((host.pages.max() + 1, PAGE, lanes(LATENT + ROPE) + 128), np.nan)
        for row, length in zip(host.pages, host.kv_len, strict=True):
            at = np.arange(length)
            cache[row[at // PAGE], at % PAGE, : LATENT + ROPE] = rng.standard_normal((length, LATENT + ROPE))
        q = (jnp.asarray(rng.standard_normal((shape.tokens, heads, n)), dtype) for n in (LATENT, ROPE))
        return Latents(host, unpack(jnp.asarray(pack(host, shape)), shape), *q, jnp.asarray(cache, dtype))

    return make


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("lengths", [DECODES, MIX])
def test_plain_xla(latents, monkeypatch, lengths, dtype):
    for budget in (1 << 27, 1):  # all tiles at once, and one at a time
        monkeypatch.setattr(xla, "BUDGET", budget)
        latents(lengths, 8, dtype).check(mla.mla_attention_xla)


@pytest.mark.parametrize(
    ("lengths", "heads", "dtype", "blocks"),
    [
        (DECODES, 16, "bfloat16", Blocks(32, 1)),
        (DECODES, 8, "float32", Blocks(16, 1, cores=2)),
        (MIX, 16, "bfloat16", Blocks(16, 16)),
        (MIX, 8, "float32", Blocks(32, 4, cores=2)),
    ],
)
def test_kernel(latents, races, lengths, heads, dtype, blocks):
    latents(lengths, heads, dtype).check(mla.mla_attention, blocks=blocks, interpret=CHECKED)
    assert not races()


def test_without_logs(latents):
    c, blocks = latents(([1, 1], [16, 35]), 8, "float32"), Blocks(16, 1)
    expected = mla.mla_attention_xla(c.q_latent, c.q_rope, c.cache, c.meta, SCALE)
    found = mla.mla_attention(c.q_latent, c.q_rope, c.cache, c.meta, SCALE, blocks=blocks, interpret=CHECKED)
    assert expected[1] is found[1] is None
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=BOUND["float32"])


@pytest.mark.parametrize("waits", [True, False])
def test_copies_carried_out_at_once(latents, monkeypatch, capfd, waits):
    if not waits:
        move = kernel._move
        monkeypatch.setattr(kernel, "_move", lambda *args: None if args[3:] == (True,) else move(*args))
    latents(([1, 1, 5], [16, 35, 20]), 8, "float32").check(mla.mla_attention, blocks=Blocks(16, 2), interpret=EAGER)
    assert ("Semaphore" not in capfd.readouterr().out) == waits  # that is not zero at the end


def test_keys_met_before_they_are_there_are_a_race(latents, races, monkeypatch):
    move, fold, late = kernel._move, kernel._fold, []

    def careless(count, pairs, sem, wait=False):
        if wait and len([*pairs(0)]) == 1:  # for keys
            late.append(lambda: move(count, pairs, sem, wait))
        else:
            move(count, pairs, sem, wait)

    def early(*args):
        fold(*args)
        late.pop()()

    monkeypatch.setattr(kernel, "_move", careless)
    monkeypatch.setattr(kernel, "_fold", early)
    c = latents(([1, 1], [16, 35]), 8, "float32")
    found = ""
    try:
        out = mla.mla_attention(c.q_latent, c.q_rope, c.cache, c.meta, SCALE, blocks=Blocks(16, 1), interpret=CHECKED)
        jax.block_until_ready(out)
    except jax.errors.JaxRuntimeError as e:  # what newer interpreters do
        found = str(e)
    assert races() or "RACE DETECTED" in found


@pytest.mark.parametrize("field", ["first", "seq"])
def test_a_wrong_plan_is_noticed(latents, wrong_plan, field):
    wrong_plan(kernel, field)
    with pytest.raises(AssertionError, match="Not equal"):
        latents(([1, 1, 1], [16, 35, 20]), 8, "float32").check(
            mla.mla_attention, blocks=Blocks(16, 1), interpret=pltpu.InterpretParams()
        )


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {
    "q_latent": struct(64, 16, 512),
    "q_rope": struct(64, 16, 64),
    "cache": struct(99, 64, 640),
    "shape": Shape(64, 64, 128, 1),
    "blocks": Blocks(512, 1),
}
BAD = [
    ({"q_latent": struct(63, 16, 512)}, "q_latent's shape is (63, 16, 512); expected [T,H,R]"),
    ({"q_rope": struct(64, 8, 64)}, "q_rope's shape is (64, 8, 64); expected [T,H,Dr]"),
    ({"cache": struct(99, 640)}, "cache's shape is (99, 640); expected [pages, page, W]"),
    ({"cache": struct(99, 64, 576)}, "W is 576; expected whole tiles of 128 for R + Dr = 576"),
    ({"cache": struct(99, 64, 640, dtype="float32")}, "dtypes is ['bfloat16', 'float32']; expected one of"),
    ({"q_latent": struct(64, 16, 500)}, "R is 500; expected a multiple of 128"),
    ({"q_latent": struct(64, 8, 512), "q_rope": struct(64, 8, 64)}, "heads is 8; expected a multiple of 16"),
    ({"cache": struct(99, 8, 640)}, "page is 8; expected a multiple of 16"),
    ({"blocks": Blocks(96, 1)}, "keys is 96; expected a multiple of the page, 64"),
    ({"blocks": Blocks(512, 0)}, "queries is 0; expected at least 1"),
    ({"blocks": Blocks(512, 1, 0)}, "cores is 0; expected at least 1"),
    ({"blocks": Blocks(1 << 16, 1)}, "VMEM for Blocks(keys=65536, queries=1, cores=1) is "),
    ({"shape": Shape(64, 64, 8192, 1)}, "bytes of the plan is 2098432; expected at most 524288"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_the_kernel_does_not_take(change, message):
    assert mla.problems(*GOOD.values()) == []
    assert any(found.startswith(message) for found in mla.problems(*{**GOOD, **change}.values()))


def test_a_refused_call_says_why(latents):
    c = latents(([1], [1]), 8, "bfloat16")
    with pytest.raises(ValueError, match="heads is 8; expected a multiple of 16"):
        mla.mla_attention(c.q_latent, c.q_rope, c.cache, c.meta, SCALE)
