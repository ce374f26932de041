"""Products of few rows against NumPy float64, interpreted: every way to cut one, shapes that nothing divides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyradix_torch.ops import Linear
from polyradix_torch.triton import skinny
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.skinny import TUNED, Tile, product

LANES = Tile(rows=4, columns=64, warps=4, stages=1)
UNITS = Tile(rows=16, columns=32, warps=4, stages=3, dot=True)
WIDE = Tile(rows=32, columns=32, warps=4, stages=3, dot=True, tokens=16)
HALF = torch.bfloat16
pytestmark = pytest.mark.usefixtures("exact")


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape)).to(HALF)


def expected(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, kind: str) -> np.ndarray:
    wide = [part.double().numpy() for part in (x, w)]
    out = wide[0] @ wide[1].T
    if bias is not None:
        out += bias.double().numpy()
    if kind == "gated":
        gate, up = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
    return out


def check(got: torch.Tensor, want: np.ndarray) -> None:
    """One rounding to bfloat16, or the errors of float32 sums."""
    assert got.shape == want.shape
    relative = 2.0**-8 if got.dtype == HALF else 0.0
    assert (np.abs(got.double().numpy() - want) <= relative * np.abs(want) + 1e-5 * np.abs(want).max()).all()


@pytest.mark.parametrize(("n", "k"), [(16, 256), (22, 161), (2, 8)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "gated", "logits"])
@pytest.mark.parametrize(("tile", "count"), [(LANES, 1), (LANES, 2), (LANES, 3), (UNITS, 1), (UNITS, 16)])
def test_product(tile: Tile, count: int, kind: skinny.Kind, splits: int, n: int, k: int) -> None:
    rng = np.random.default_rng(n * k + count)
    x, w, bias = normal(rng, count, k), normal(rng, n, k), normal(rng, n)
    for b in (None, bias):
        got = product(x, w, b, replace(tile, splits=splits), kind)
        assert got.dtype == (torch.float32 if kind == "logits" else HALF)
        check(got, expected(x, w, b, kind))


@pytest.mark.parametrize("count", range(1, 17))
def test_every_number_of_rows(count: int) -> None:
    rng = np.random.default_rng(count)
    x, w = normal(rng, count, 40), normal(rng, 20, 40)
    for tile in (UNITS, LANES)[: 1 + (count <= 4)]:
        check(product(x, w, None, tile), expected(x, w, None, "linear"))


@pytest.mark.parametrize("tile", [LANES, UNITS])
def test_an_odd_number_of_rows(tile: Tile) -> None:
    rng = np.random.default_rng(0)
    x, w = normal(rng, 2, 77), normal(rng, 37, 77)
    check(product(x, w, None, replace(tile, splits=2)), expected(x, w, None, "linear"))


@pytest.mark.parametrize("kind", ["linear", "gated", "logits"])
@pytest.mark.parametrize(("count", "n", "k", "processors"), [(48, 96, 128, 132), (150, 40, 40, 1), (3, 88, 72, 1)])
def test_many_rows(
    count: int, n: int, k: int, processors: int, kind: skinny.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program for each tile, and with one for all; with more than eight rows of tiles."""
    monkeypatch.setattr(skinny, "_processors", lambda device: processors)
    rng = np.random.default_rng(count)
    x, w, bias = normal(rng, count, k), normal(rng, n, k), normal(rng, n)
    check(product(x, w, None, WIDE, kind), expected(x, w, None, kind))
    check(product(x, w, bias, WIDE, kind), expected(x, w, bias, kind))


@pytest.mark.parametrize("tile", [UNITS, WIDE])
def test_parts_of_many_rows(tile: Tile) -> None:
    rng = np.random.default_rng(5)
    x, w, bias = normal(rng, 40, 136), normal(rng, 72, 136), normal(rng, 72)
    for splits in (2, 3, 2):
        check(product(x, w, bias, replace(tile, splits=splits)), expected(x, w, bias, "linear"))
        assert not skinny.arrivals(x.device).any()


def test_a_gate_over_parts() -> None:
    x = torch.zeros(32, 32, dtype=HALF)
    with pytest.raises(ValueError, match="cannot be split"):
        product(x, x, None, replace(WIDE, splits=2), "gated")


def test_rows_of_x_apart() -> None:
    rng = np.random.default_rng(1)
    wide, w = normal(rng, 3, 200), normal(rng, 12, 64)
    check(product(wide[:, 100:164], w, None, LANES), expected(wide[:, 100:164], w, None, "linear"))


def test_parts_are_joined_again_and_again() -> None:
    """Every launch finds the counters as the one before it left them, whatever its shape was; bits are the same."""
    rng = np.random.default_rng(2)
    seen: dict[int, torch.Tensor] = {}
    given = [(normal(rng, 2, k), normal(rng, n, k)) for n, k in ((24, 300), (60, 130))]
    for turn in range(6):
        which = turn % 2
        x, w = given[which]
        got = product(x, w, None, replace(LANES, splits=2 + 3 * which))
        check(got, expected(x, w, None, "linear"))
        assert torch.equal(seen.setdefault(which, got), got)
        assert not skinny.arrivals(x.device).any()


def test_more_tiles_than_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "TILES", 5)
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="6 tiles of 4 rows cannot be split; expected at most 5"):
        product(normal(rng, 1, 128), normal(rng, 24, 128), None, replace(LANES, splits=2))


VERBS = {"linear": "linear", "linear_reduce": "linear", "linear_gated": "gated", "logits": "logits"}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[Tile, str]]]:
    """What `product` is asked for, on a device with a file: tiles of up to 2 rows for w [32,96], and torch for 1."""
    tiles = {"linear": LANES, "gated": replace(UNITS, splits=2), "logits": UNITS}
    products = {skinny.key_of(kind, 2, 32, 96): vars(tile) for kind, tile in tiles.items()}
    products |= {skinny.key_of(kind, 1, 32, 96): None for kind in tiles}
    (tmp_path / "cpu.json").write_text(json.dumps({"products": products}))
    monkeypatch.setattr(skinny, "TUNED", tmp_path)
    seen = []

    def seeing(*args: Any) -> torch.Tensor:
        seen.append((args[3], args[4] if len(args) > 4 else "linear"))
        return product(*args)

    monkeypatch.setattr(skinny, "product", seeing)
    skinny._tuned.cache_clear()
    yield seen
    skinny._tuned.cache_clear()


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_the_tile_of_their_shape(verb: str, made: list[tuple[Tile, str]]) -> None:
    rng, kind = np.random.default_rng(4), VERBS[verb]
    bias = None if verb == "logits" else normal(rng, 32)
    rest = ("silu",) if kind == "gated" else ()
    for count, n, tiled in ((2, 32, True), (1, 32, False), (3, 32, False), (2, 30, False)):
        x, w = normal(rng, count, 96), normal(rng, n, 96)
        b = bias if bias is None else bias[:n]
        got = getattr(TritonOps(), verb)(x, Linear(w, b), *rest)
        want = expected(x, w, b, kind)
        assert got.dtype == (torch.float32 if kind == "logits" else HALF)
        assert np.abs(got.double().numpy() - want).max() < 0.02 * np.abs(want).max()
        assert [k for _, k in made] == ([kind] if tiled else [])
        made.clear()
    wide = Linear(normal(rng, 32, 96).float(), None)
    getattr(TritonOps(), verb)(normal(rng, 2, 96).float(), wide, *rest)
    assert made == [], "float32 is torch's"


def test_files_of_tiles_can_be_read() -> None:
    """Those in the package; a tile is one that its number of rows can have."""
    for path in TUNED.glob("*.json"):
        for key, tile in json.loads(path.read_text())["products"].items():
            kind, count, *_ = key.split()
            assert kind in VERBS.values()
            assert tile is None or Tile(**tile).dot or int(count) <= 4
