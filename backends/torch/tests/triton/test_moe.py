"""The grouped products against NumPy float64, interpreted, for every size of block; and what NaN may not do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import MoeSpec, MoeWeights
from polyradix_torch.triton import moe, tune
from polyradix_torch.triton.moe import DOWN, GATE_UP, Blocks, Router, Routes

COUNTS = (0, 1, 130, 0, 17, 2)  # pairs of each expert: none, one, more than a tile
EACH = 3  # pairs of a token
ALL = [(True, b) for rows in GATE_UP.values() for _, b in rows] + [
    (False, b) for rows in DOWN.values() for _, b in rows
]
ALL += [(gated, Blocks(64, 32, 64, 4, 2, True)) for gated in (True, False)]
pytestmark = pytest.mark.usefixtures("exact")


def normal(seed: int, *shape: int, dtype: Any = torch.bfloat16) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def routed() -> tuple[Routes, np.ndarray]:
    """Routes with shuffled lists, and each pair's expert."""
    experts = np.random.default_rng(1).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    lists = np.full((len(COUNTS), len(experts)), -(1 << 20), np.int32)
    for e, count in enumerate(COUNTS):
        lists[e, :count] = np.random.default_rng(e).permutation(np.nonzero(experts == e)[0])
    return Routes(
        torch.zeros(len(experts) // EACH, EACH), torch.tensor(lists), torch.tensor(COUNTS, dtype=torch.int32)
    ), experts


@pytest.mark.parametrize(("gated", "blocks"), ALL)
@pytest.mark.parametrize(("n", "k"), [(36, 72), (80, 128)])
def test_product(gated: bool, blocks: Blocks, n: int, k: int) -> None:
    routes, experts = routed()
    x, w = normal(2, len(experts) // (EACH if gated else 1), k), normal(3, len(COUNTS), n, k) / k**0.5
    got = moe.product(x, w, routes, gated, blocks)
    given = x.double().numpy().repeat(EACH, 0) if gated else x.double().numpy()
    want = np.einsum("pk,pnk->pn", given, w.double().numpy()[experts])
    if gated:
        gate, up = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * up
    assert got.shape == want.shape
    assert (np.abs(got.double().numpy() - want) <= 2.0**-8 * np.abs(want) + 1e-5 * np.abs(want).max()).all()


def test_blocks_of_the_file_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, w, best = torch.zeros(24, 64, dtype=torch.bfloat16), torch.zeros(4, 32, 64), Blocks(64, 32, 64, 4, 2)
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts/cpu.json").write_text(
        tune.file_of({moe.key_of(5, 32, 64, True): asdict(best)}, tmp_path / "none")
    )
    monkeypatch.setattr(moe, "TUNED", tmp_path)
    moe._tuned.cache_clear()
    try:
        assert moe.chosen(x, w, 8, True) == best
        assert moe.chosen(x, w, 9, True) != best
        assert moe.chosen(x, w, 8, False) != best
    finally:
        moe._tuned.cache_clear()


def test_a_router_keeps_every_bit() -> None:
    weight = normal(4, 8, 64, dtype=torch.float32)
    assert len(Router.of(weight, None).parts) == 3
    assert torch.equal(Router.of(weight, None).parts.double().sum(0), weight.double())
    assert len(Router.of(weight.bfloat16().float(), None).parts) == 1


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's own
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_row_of_nan_spoils_no_other(scoring: Any) -> None:
    """And writes nowhere else, which the interpreter would refuse."""
    spec = MoeSpec(6, 3, scoring, groups=3, top_groups=2, group_best=2)
    router = Router.of(normal(5, 6, 64, dtype=torch.float32), torch.zeros(6))
    w = MoeWeights(router, normal(6, 6, 32, 64), normal(7, 6, 64, 16))
    x = normal(8, 9, 64)
    clean = moe.moe(x, w, spec)
    x[[0, 4, 8]] = float("nan")
    spoilt = moe.moe(x, w, spec)
    assert spoilt[[0, 4, 8]].isnan().all()
    others = [1, 2, 3, 5, 6, 7]
    assert torch.equal(spoilt[others], clean[others])
    assert clean.isfinite().all()


def test_ranks_add_up_their_own_experts() -> None:
    """In float32, each its two of six, against NumPy float64; with biases and the clamped gate."""
    spec = MoeSpec(6, 3, bias="logits", limit=2.0, alpha=1.7)
    router, shift = normal(5, 6, 64, dtype=torch.float32), normal(9, 6, dtype=torch.float32)
    gate_up, down, x = normal(6, 6, 32, 64) / 8, normal(7, 6, 64, 16) / 4, normal(8, 9, 64)
    wide, narrow = normal(10, 6, 32), normal(11, 6, 64)
    rows, weights = x.double().numpy(), [w.double().numpy() for w in (gate_up, wide, down, narrow)]
    z = rows @ router.double().numpy().T + shift.double().numpy()
    p, chosen = np.exp(z), np.argsort(-z, axis=1)[:, :3]
    for first in (0, 2, 4):
        here = slice(first, first + 2)
        two = MoeWeights(
            Router.of(router, shift), moe.Biased(gate_up[here], wide[here]), moe.Biased(down[here], narrow[here])
        )
        want = np.zeros((9, 64))
        for t, ids in enumerate(chosen):
            for e in set(ids) & {first, first + 1}:
                gate, up = np.split(weights[0][e] @ rows[t] + weights[1][e], 2)
                gate, up = np.minimum(gate, 2.0), np.clip(up, -2.0, 2.0)
                inner = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
                want[t] += p[t, e] / p[t, ids].sum() * (weights[2][e] @ inner + weights[3][e])
        got = moe.moe(x, two, spec, first)
        assert got.dtype == torch.float32
        assert np.abs(got.double().numpy() - want).max() < 2.0**-7 * np.abs(want).max()
