"""The simulated device, over the wheel of this environment; one in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from polyradix_npu.device import start

start(emulated=True)

from polyradix_npu import contracts, contracts_attention  # noqa: E402  # torch comes after the stand-ins
from polyradix_npu.emulate.device import SimulatedDevice  # noqa: E402
from polyradix_npu.emulate.graphs import device as the_device  # noqa: E402


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with the_device() as entered:
        yield entered


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Called with forms of attention, makes the simulated device refuse them."""

    def refuse(*forms: str) -> None:
        def check(c: contracts.Given) -> None:
            c.need(c.input_layout not in forms, "input_layout", "another")
            contracts_attention.attention(c)

        monkeypatch.setitem(contracts_attention.CHECKS, "npu_fused_infer_attention_score_v2", check)

    return refuse
