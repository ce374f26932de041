"""The simulated device, over the wheel of this environment; one in a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyradix_npu.device import start

start(emulated=True)

from polyradix_npu.emulate.device import SimulatedDevice  # noqa: E402  # torch comes after the stand-ins
from polyradix_npu.emulate.graphs import device as the_device  # noqa: E402


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with the_device() as entered:
        yield entered
