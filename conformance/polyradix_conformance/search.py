"""Drawing examples with Hypothesis: the same few in every run, or with POLYRADIX_CONFORM_FUZZ new ones each time.

The variable is a number of examples per case, or of seconds per case with an s, as in `60s`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from polyradix_conformance.rig import Mismatch

FUZZ = "POLYRADIX_CONFORM_FUZZ"
ROUND = 20  # examples between looks at the clock


def search(relation: Callable[..., None], examples: int, **drawn: SearchStrategy[Any]) -> None:
    """Calls relation(**drawn) with `examples` draws; a Mismatch names the draw. Raises ValueError for a bad FUZZ."""
    count, seconds = _budget(os.environ.get(FUZZ, ""))

    def judged(**draw: Any) -> None:
        try:
            relation(**draw)
        except Mismatch as e:
            raise Mismatch(f"{e}; with {draw}") from e

    chosen = settings(
        max_examples=count or (ROUND if seconds else examples),
        derandomize=not (count or seconds),
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # shrinking takes minutes, and a case has a time limit
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    end = time.monotonic() + seconds
    while True:
        chosen(given(**drawn)(judged))()
        if time.monotonic() >= end:
            return


def _budget(text: str) -> tuple[int, int]:
    """Examples and seconds, one of them zero; both for an empty text."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"([1-9]\d*)(s?)", text)
    if not match:
        raise ValueError(f"{FUZZ} is {text!r}; expected a number of examples, or of seconds as in '60s'")
    return (0, int(match[1])) if match[2] else (int(match[1]), 0)
