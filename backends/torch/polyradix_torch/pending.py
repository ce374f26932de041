"""A copy to the host that nobody waits for before its values are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from polyradix.backend.protocol import HostArray
from polyradix_torch.errors import told
from polyradix_torch.host import to_numpy

POLL = 2e-4  # seconds


class Pending(Future[HostArray]):
    """A copy of x under way. Whoever asks for its result waits for it, no worker does: it is done when asked, so
    concurrent.futures.wait is not for it. `device` is torch.cuda, or the module of another device with its names."""

    def __init__(self, x: torch.Tensor, device: Any) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._device = device
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._event = device.Event()
        self._event.record()

    def done(self) -> bool:
        with suppress(TimeoutError):
            self._settle(0)
        return super().done()

    def result(self, timeout: float | None = None) -> HostArray:
        self._settle(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._settle(timeout)
        return super().exception()

    def add_done_callback(self, fn: Callable[[Future[HostArray]], object]) -> None:
        self._settle(None)
        super().add_done_callback(fn)

    def _settle(self, timeout: float | None) -> None:
        if super().done():
            return
        try:
            told(self._device, self._wait)(timeout)
        except TimeoutError:
            raise
        except Exception as error:
            self.set_exception(error)
        else:
            self.set_result(to_numpy(self._host))

    def _wait(self, timeout: float | None) -> None:
        if timeout is None:
            self._event.synchronize()
            return
        end = time.monotonic() + timeout
        while not self._event.query():
            if time.monotonic() >= end:
                raise TimeoutError(f"the device was not done within {timeout} s")
            time.sleep(POLL)
