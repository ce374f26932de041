"""Defects that take the process along: a supervisor must survive them and say so."""

from __future__ import annotations

import os
import time
from typing import Any

from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps
from polyradix.backend.protocol import AttnSpec
from polyradix_conformance.sabotage import sabotage


@sabotage("L1/attend", process=True)
class Hang(NumpyOps):
    """Attention never ends."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        while True:
            time.sleep(60)


@sabotage("L1/attend", process=True)
class Crash(NumpyOps):
    """Attention ends the process."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        os._exit(7)
