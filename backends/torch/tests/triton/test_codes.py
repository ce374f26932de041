"""Products with weights kept quantised against NumPy float64, interpreted: every way to cut one, shapes that nothing
divides, float8 with the chip's conversion and without."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from polyradix.backend.protocol import Quant
from polyradix_torch.quant import Codes
from polyradix_torch.triton import codes, eight, quant, skinny, tune
from polyradix_torch.triton.codes import Cut
from polyradix_torch.triton.moe import Routes

BLOCK, CHANNEL, GROUP, SMALL = (
    Quant("fp8", (32, 32)),
    Quant("fp8", (1, 96)),
    Quant("int4", (1, 64)),
    Quant("int4", (8, 32)),
)
CUTS = (
    Cut(2, 4, 128, 4, 1, form="lanes"),
    Cut(16, 32, 32, 4, 3, form="left"),
    Cut(16, 16, 128, 4, 3, form="right"),
    Cut(32, 32, 32, 4, 3, form="right", fold=True),
    Cut(16, 16, 32, 4, 3, form="left", fold=True),
)
pytestmark = pytest.mark.usefixtures("exact")


def made(q: Quant, *shape: int, seed: int = 0) -> tuple[Codes, np.ndarray]:
    """A weight, and its values in float64."""
    random = np.random.default_rng(seed)
    (*outer, n, k), (tall, wide) = shape, q.block
    blocks = (*outer, -(-n // tall), -(-k // wide))
    scale = random.uniform(0.5, 2, blocks).astype(np.float32)

    def spread(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64).repeat(tall, -2)[..., :n, :].repeat(wide, -1)[..., :k]

    if q.format == "int4":
        nibbles, zero = random.integers(0, 16, shape), random.integers(0, 16, blocks).astype(np.uint8)
        packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).astype(np.uint8)
        value = (nibbles - spread(zero)) * spread(scale)
        return Codes(q, torch.from_numpy(packed), torch.from_numpy(scale), torch.from_numpy(zero)), value
    bits = random.integers(0, 0x7F, shape).astype(np.uint8) | (random.integers(0, 2, shape) << 7).astype(np.uint8)
    value = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * spread(scale)
    return Codes(q, torch.from_numpy(bits).view(torch.float8_e4m3fn), torch.from_numpy(scale), None), value


def near(
    got: torch.Tensor, x: torch.Tensor, value: np.ndarray, rounded: bool, bias: torch.Tensor | None = None
) -> None:
    """One rounding of the result, and one of each number of the weight if it is `rounded`."""
    wide = x.double().numpy()
    want, most = wide @ value.T, np.abs(wide) @ np.abs(value).T
    if bias is not None:
        want += bias.double().numpy()
    unit = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23
    bound = unit * np.abs(want) + (unit if rounded else 1e-6) * most
    assert got.dtype == x.dtype
    assert (np.abs(got.double().numpy() - want) <= bound).all()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: f"{c.form}{'-fold' * c.fold}")
@pytest.mark.parametrize("q", [BLOCK, CHANNEL, GROUP, SMALL], ids=lambda q: f"{q.format} {q.block}")
def test_every_cut(q: Quant, cut: Cut) -> None:
    for (count, n, k), splits in (((2, 36, 96), 1), ((1, 24, 224), 3), ((37, 20, 96), 2)):
        if cut.form == "lanes" and count > 2:
            continue
        if q is CHANNEL:
            k = 96
        w, value = made(q, n, k)
        x, bias = normal(count, k), normal(n)
        near(codes.product(x, w, bias, replace(cut, splits=splits)), x, value, cut.fold, bias)
        assert not skinny.arrivals(x.device).any()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2], None])
def test_every_code_of_float8(monkeypatch: pytest.MonkeyPatch, native: bool, cut: Cut | None) -> None:
    """Each alone in a row, in a block of its own scale; None makes a dense weight."""
    monkeypatch.setattr(eight, "_native", lambda device: native)
    numbers = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    scale = np.random.default_rng(0).uniform(0.5, 2, (254, 1)).astype(np.float32)
    bits = np.zeros((254, 128), np.uint8)
    bits[np.arange(254), np.arange(254) % 128] = numbers
    w = Codes(Quant("fp8", (1, 128)), torch.from_numpy(bits).view(torch.float8_e4m3fn), torch.from_numpy(scale), None)
    want = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale[:, 0]
    x = torch.ones(2, 128)
    got = x @ codes.dense(w, x.dtype).T if cut is None else codes.product(x, w, None, cut)
    np.testing.assert_allclose(got.numpy(), np.tile(want, (len(got), 1)), rtol=2.0**-23)


@pytest.mark.parametrize("q", [BLOCK, CHANNEL, GROUP, SMALL], ids=lambda q: f"{q.format} {q.block}")
def test_a_dense_weight(q: Quant) -> None:
    w, value = made(q, 20, 96)
    got = codes.dense(w, torch.bfloat16)
    assert got.shape == value.shape
    assert (np.abs(got.double().numpy() - value) <= 2.0**-8 * np.abs(value)).all()


@pytest.mark.parametrize("cut", CUTS[1:4], ids=lambda c: f"{c.form}{'-fold' * c.fold}")
@pytest.mark.parametrize("q", [BLOCK, GROUP], ids=lambda q: f"{q.format} {q.block}")
def test_experts(q: Quant, cut: Cut) -> None:
    counts, each = (0, 1, 37, 0, 17, 2), 3
    random = np.random.default_rng(1)
    expert = random.permutation(np.repeat(np.arange(len(counts)), counts))
    lists = np.full((len(counts), len(expert)), -(1 << 20), np.int32)
    for e, count in enumerate(counts):
        lists[e, :count] = random.permutation(np.nonzero(expert == e)[0])
    routes = Routes(torch.zeros(19, each), torch.from_numpy(lists), torch.tensor(counts, dtype=torch.int32))
    (w, value), bias = made(q, len(counts), 36, 96), normal(len(counts), 36)
    for x in (normal(19, 96), normal(57, 96)):
        got, given = quant.product(x, w, routes, bias, cut), x.repeat_interleave(57 // len(x), 0)
        for e in range(len(counts)):
            near(got[expert == e], given[expert == e], value[e], cut.fold, bias[e])


def test_pairs_of_columns_at_an_odd_place() -> None:
    w, value = made(GROUP, 16, 64)
    x = normal(129)[1:65].view(1, 64)
    near(codes.product(x, w, None, CUTS[1]), x, value, False)


def test_more_tiles_than_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "TILES", 1)
    with pytest.raises(ValueError, match="2 tiles of 16 rows cannot be split; expected at most 1"):
        codes.product(normal(1, 64), made(GROUP, 32, 64)[0], None, replace(CUTS[2], splits=2))


def test_the_file_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then what is usual; of many rows a dense weight."""
    w, best = made(GROUP, 32, 64)[0], Cut(32, 16, 64, 2, 5, 3, "left", True)
    keys = {codes.key_of("linear", GROUP, 16, 32, 64): asdict(best), codes.key_of("linear", GROUP, 32, 32, 64): None}
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/cpu.json").write_text(tune.file_of(keys, tmp_path / "none"))
    monkeypatch.setattr(codes, "TUNED", tmp_path)
    codes._tuned.cache_clear()
    try:
        assert [codes.chosen(normal(count, 64), w) for count in (3, 16, 17)] == [best, best, None]
        assert codes.chosen(normal(2, 64), w) == codes.usual(torch.bfloat16, 2, 32, 64)
        assert codes.chosen(normal(4, 64).float(), w) == codes.usual(torch.float32, 4, 32, 64)
        assert codes.chosen(normal(4096, 64), w) is None
    finally:
        codes._tuned.cache_clear()


def test_files_of_cuts_can_be_read() -> None:
    for path in (codes.TUNED / "codes").glob("*.json"):
        for key, cut in json.loads(path.read_text())["products"].items():
            kind, _, _, count, *_ = key.split()
            assert kind in ("linear", "experts")
            assert kind == "linear" or cut is not None
            assert cut is None or Cut(**cut).form != "lanes" or int(count) <= 4
