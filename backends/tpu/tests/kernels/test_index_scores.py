from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels import index_scores
from polyradix_tpu.kernels.index_scores import kernel, reference

CHECKED = pltpu.InterpretParams(detect_races=True)
EAGER = pltpu.InterpretParams(dma_execution_mode="eager")
PAGE, PAGES, FIRST, WIDE = 16, 8, 192, 384
DECODE, PREFILL = [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 67, 128], [37, 128, 33, 5]


@dataclass
class Tiles:
    args: tuple[Any, ...]

    def check(self, f: Any, **options: Any) -> None:
        out = np.asarray(jax.jit(lambda *args: f(*args, FIRST, **options))(*self.args), float)
        assert out.shape == (*self.args[0].shape[:2], PAGE * PAGES)
        for found, expected in zip(out, reference.scores(*self.args, FIRST), strict=True):
            scale = abs(expected).max()
            np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=0, atol=3e-6 * scale)


@pytest.fixture
def tiles():
    """Seeded values, pages shuffled, and NaN wherever no tile has a key."""

    def make(until: list[int], tile: int, dtype: str, heads: int = 8, dim: int = 128) -> Tiles:
        rng = np.random.default_rng(sum(until))
        counts = -(-np.array(until) // PAGE)
        ids = np.split(rng.permutation(np.arange(1, 1 + counts.sum())), np.cumsum(counts)[:-1])
        pages, cache = np.zeros((len(until), PAGES), np.int32), np.full((1 + counts.sum(), PAGE, WIDE), np.nan)
        for table, own, n in zip(pages, ids, until, strict=True):
            table[: len(own)] = own
            at = np.arange(n)
            cache[table[at // PAGE], at % PAGE, FIRST : FIRST + dim] = rng.standard_normal((n, dim))
        index = jnp.asarray(rng.standard_normal((len(until), tile, heads, dim)), dtype)
        weights = jnp.asarray(rng.standard_normal((len(until), tile, heads)), jnp.float32)
        return Tiles((index, weights, jnp.asarray(cache, dtype), jnp.asarray(pages), jnp.asarray(until, jnp.int32)))

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("until", "tile"), [(DECODE, 1), (PREFILL, 16)])
def test_plain_xla(tiles, until, tile, dtype):
    tiles(until, tile, dtype).check(index_scores.scores_xla)


@pytest.mark.parametrize(
    ("until", "tile", "dtype", "keys"),
    [
        (DECODE, 1, "bfloat16", 32),
        (DECODE, 1, "float32", 128),
        (PREFILL, 16, "bfloat16", 16),
        (PREFILL, 4, "float32", 64),
    ],
)
def test_kernel(tiles, races, until, tile, dtype, keys):
    tiles(until, tile, dtype).check(index_scores.scores, keys=keys, interpret=CHECKED)
    assert not races()


def test_interpreted_it_takes_small_sizes(tiles):
    tiles([5, 20], 2, "float32", heads=3, dim=24).check(index_scores.scores, keys=16, interpret=CHECKED)


@pytest.mark.parametrize("waits", [True, False])
def test_copies_carried_out_at_once(tiles, monkeypatch, capfd, waits):
    if not waits:
        move = kernel._move
        monkeypatch.setattr(kernel, "_move", lambda *args: None if args[7:] == (True,) else move(*args))
    tiles([16, 35], 1, "float32").check(index_scores.scores, keys=16, interpret=EAGER)
    assert ("Semaphore" not in capfd.readouterr().out) == waits  # that is not zero at the end


def test_keys_met_before_they_are_there_are_a_race(tiles, races, monkeypatch):
    move, scores, late = kernel._move, kernel._scores, []

    def careless(*args):
        late.append(lambda: move(*args)) if args[7:] == (True,) else move(*args)

    def early(*args):
        out = scores(*args)
        late.pop()()
        return out

    monkeypatch.setattr(kernel, "_move", careless)
    monkeypatch.setattr(kernel, "_scores", early)
    found = ""
    try:
        args = tiles([16, 35], 1, "float32").args
        jax.block_until_ready(index_scores.scores(*args, FIRST, keys=16, interpret=CHECKED))
    except jax.errors.JaxRuntimeError as e:  # what newer interpreters do
        found = str(e)
    assert races() or "RACE DETECTED" in found


def test_keys_of_the_next_page_are_noticed(tiles, monkeypatch):
    move = kernel._move
    monkeypatch.setattr(kernel, "_move", lambda c, h, s, pages, at, *rest: move(c, h, s, pages, at + 1, *rest))
    with pytest.raises(AssertionError, match="Not equal"):
        tiles([16, 35], 1, "float32").check(index_scores.scores, keys=16, interpret=pltpu.InterpretParams())


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {
    "index": struct(9, 16, 64, 128),
    "weights": struct(9, 16, 64, dtype="float32"),
    "cache": struct(99, 64, 768),
    "pages": struct(9, 128, dtype="int32"),
    "until": struct(9, dtype="int32"),
    "first": 576,
    "keys": 1024,
}
BAD = [
    ({"index": struct(16, 64, 128)}, "index's shape is (16, 64, 128); expected [C,tile,heads,dim]"),
    ({"cache": struct(99, 768)}, "cache's shape is (99, 768); expected [pages, page, W]"),
    ({"pages": struct(8, 128)}, "pages' shape is (8, 128); expected [C,P]"),
    ({"weights": struct(9, 64, 16)}, "weights' shape is (9, 64, 16); expected (9, 16, 64)"),
    ({"until": struct(8)}, "until's shape is (8,); expected (9,)"),
    ({"cache": struct(99, 64, 768, dtype="float32")}, "dtypes is ['bfloat16', 'float32']; expected one of"),
    ({"first": 641}, "first is 641; expected at most 640"),
    ({"keys": 96}, "keys is 96; expected a multiple of the page, 64"),
    ({"keys": 768}, "keys is 768; expected a part of the context, 8192"),
    ({"keys": 64}, "keys is 64; expected a multiple of 128"),
    ({"index": struct(9, 16, 64, 96)}, "dim is 96; expected a multiple of 128"),
    ({"cache": struct(99, 64, 704)}, "W is 704; expected a multiple of 128"),
    ({"index": struct(9, 16, 4, 128), "weights": struct(9, 16, 4)}, "heads is 4; expected a multiple of 8"),
    ({"cache": struct(99, 8, 768), "pages": struct(9, 1024)}, "page is 8; expected a multiple of 16"),
    ({"keys": 8192}, "VMEM for 8192 rows and 8192 keys is "),
    (
        {"pages": struct(9, 1 << 14), "cache": struct(99, 16, 768)},
        "bytes of the page table is 589860; expected",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_the_kernel_does_not_take(change, message):
    assert index_scores.problems(*GOOD.values()) == []
    assert any(found.startswith(message) for found in index_scores.problems(*{**GOOD, **change}.values()))


@pytest.mark.parametrize(("tile", "pages", "keys"), [(1, 128, 2048), (16, 128, 1024), (16, 81, 64)])
def test_keys_are_a_part_of_the_context(tile, pages, keys):
    assert index_scores.choose(struct(9, tile, 64, 128), GOOD["cache"], struct(9, pages)) == keys


def test_a_refused_call_says_why(tiles):
    with pytest.raises(ValueError, match="heads is 4; expected a multiple of 8"):
        index_scores.scores(*tiles([1], 1, "bfloat16", heads=4).args, FIRST)
