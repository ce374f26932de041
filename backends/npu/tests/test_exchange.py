"""Rows sent to the ranks of their experts and back, over simulated ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyradix_npu import calls
from polyradix_npu.contracts import WrongCall
from polyradix_npu.emulate.exchange import on_ranks

EXPERTS, TOKENS, TOP, WIDTH = 8, 5, 3, 64


def given(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(rank)
    ids = random.random((TOKENS, EXPERTS)).argsort(1)[:, :TOP].astype(np.int32)
    x = torch.from_numpy(random.standard_normal((TOKENS, WIDTH), np.float32)).bfloat16()
    return x, torch.from_numpy(ids), torch.from_numpy(random.random((TOKENS, TOP), np.float32))


@pytest.mark.parametrize("chip", ["Ascend910B2", "Ascend910_9391"])  # A2 and A3
@pytest.mark.parametrize("size", [2, 4])
def test_rows_are_sorted_by_expert_and_come_back_weighted(
    size: int, chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.npu, "get_device_name", lambda: chip)
    own = EXPERTS // size

    def run(rank: int, group: str) -> None:
        x, ids, weights = given(rank)
        asked = ids.to("npu"), weights.to("npu"), calls.Ranks(group, size, rank), EXPERTS
        rows, counts, told = calls.dispatch(x.to("npu"), *asked)
        assert (told[2] is None) == (chip != "Ascend910B2")
        want = [
            other[t]
            for e in range(rank * own, (rank + 1) * own)
            for other, chosen, _ in map(given, range(size))
            for t in range(TOKENS)
            if e in chosen[t]
        ]
        held = counts.cpu().tolist()
        assert len(held) == own
        assert torch.equal(rows[: sum(held)].cpu(), torch.stack(want))
        factors = torch.repeat_interleave(torch.arange(own) + rank * own + 1, torch.tensor(held))
        rows[: len(factors)] *= factors[:, None].bfloat16().to("npu")
        got = calls.collect(rows, *asked, told).cpu().double().numpy()
        wide, scale = x.double().numpy(), (weights.double() * (ids + 1)).sum(1, keepdim=True).numpy()
        np.testing.assert_allclose(got, wide * scale, rtol=0.01, atol=0.05)

    on_ranks(size, run)


def test_a_rank_that_does_not_come_is_waited_for_in_vain() -> None:
    def run(rank: int, group: str) -> None:
        x, ids, weights = given(rank)
        if rank == 0:
            calls.dispatch(x.to("npu"), ids.to("npu"), weights.to("npu"), calls.Ranks(group, 2, 0), EXPERTS)

    with pytest.raises(WrongCall, match="would wait for ever"):
        on_ranks(2, run, timeout=0.2)


def test_ranks_that_differ_are_refused() -> None:
    def run(rank: int, group: str) -> None:
        x, ids, weights = (t[: TOKENS - rank].to("npu") for t in given(rank))
        calls.dispatch(x, ids, weights, calls.Ranks(group, 2, rank), EXPERTS)

    with pytest.raises(WrongCall, match="expected the same on all ranks"):
        on_ranks(2, run)
