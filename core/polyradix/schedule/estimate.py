"""How many pages outputs to come will take. Knows no requests."""

from __future__ import annotations

import numpy as np

from polyradix.backend.batch import I32

RISE = 0.02  # docs/decisions/008-scheduling.md compares these two with others
HALF_LIFE = 100  # steps


class Estimate:
    """A page for each request, or a share of the most it may still need, if that is more. The share starts at 0, rises
    by RISE times `conservativeness` whenever pages ran out and a request had to be retracted, and fades."""

    def __init__(self, conservativeness: float) -> None:
        self.share = 0.0
        self._rise = RISE * conservativeness

    def pages(self, growth: I32, page_size: int) -> int:
        """For requests that may store `growth` [n] more tokens each."""
        share = self.share / page_size
        return int(np.ceil(growth * share).sum()) if share else int(np.count_nonzero(growth))

    def was_low(self) -> None:
        self.share = min(1.0, self.share + self._rise)

    def fade(self) -> None:
        """A step has passed."""
        self.share *= 0.5 ** (1 / HALF_LIFE)
