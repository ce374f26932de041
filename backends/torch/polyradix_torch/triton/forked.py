"""Shared experts beside the routed ones: what a graph of verbs leaves independent, on a second stream of a capture."""

from __future__ import annotations

from typing import Any

import torch

from polyradix.backend.protocol import Gate, MoeSpec, MoeWeights, Ops


class Forked:
    """An Ops of one stream as one of two. What was given to `moe` may go to a `linear_gated` next, and the result to
    `linear_reduce`: these two run on `side`, from where `moe` began. Whatever other verb comes waits for them first, so
    that only `moe`, `linear_gated` and `linear_reduce` must bear that others run beside them.

    Memory: what one stream frees, it alone takes again; `side` begins after all that was launched before `moe`, and x
    is kept until it was waited for."""

    def __init__(self, ops: Ops, side: Any) -> None:
        self._ops, self._side = ops, side
        self._given: Any = None  # to `moe`, last
        self._begin: Any = None  # where it began
        self._made: Any = None  # on `side`, last

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._ops, name)

        def joined(*args: Any, **named: Any) -> Any:
            self.join()
            return verb(*args, **named)

        return joined

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> Any:
        self.join()
        self._given, self._begin = x, torch.cuda.Event()
        self._begin.record()
        return self._ops.moe(x, w, s)

    def linear_gated(self, x: torch.Tensor, w: Any, kind: Gate) -> Any:
        if x is not self._given or self._made is not None:
            self.join()
            return self._ops.linear_gated(x, w, kind)
        self._side.wait_event(self._begin)
        with torch.cuda.stream(self._side):
            self._made = self._ops.linear_gated(x, w, kind)
        return self._made

    def linear_reduce(self, x: torch.Tensor, w: Any) -> Any:
        if self._made is None or x is not self._made:
            self.join()
            return self._ops.linear_reduce(x, w)
        with torch.cuda.stream(self._side):
            self._made = self._ops.linear_reduce(x, w)
        return self._made

    def join(self) -> None:
        """What comes next may use whatever was made."""
        if self._made is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        self._given = self._begin = self._made = None
