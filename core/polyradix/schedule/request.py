"""One request as the scheduler sees it. Token ids only, no text."""

from __future__ import annotations

import math
import time

import numpy as np

from polyradix.backend.batch import I32
from polyradix.cache.blocks import Block
from polyradix.cache.radix import Node
from polyradix.grammar.spec import Matcher
from polyradix.schedule.params import SamplingParams


class Request:
    """Mutable state of one request. `seed` is what sampling uses, in place of the one in params: low 32 bits."""

    def __init__(
        self,
        rid: str,
        prompt: I32,
        params: SamplingParams,
        eos: frozenset[int] = frozenset(),
        namespace: str = "",
        seed: int = 0,
        priority: int = 0,
        tenant: str = "",
    ) -> None:
        self.rid = rid
        self.prompt: I32 = np.ascontiguousarray(prompt, np.int32)
        self.params = params
        self.namespace = namespace
        self.seed = seed
        self.priority = priority  # the lower number is the more important request
        self.tenant = tenant
        self.stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        self.outputs: list[int] = []
        self.matcher: Matcher | None = None  # has taken `outputs`; set before the request is added
        self.timeout: float | None = None  # seconds, and when it ends on the engine's clock; the scheduler has none
        self.deadline = math.inf
        self.jumps = False  # tokens that the matcher forces are not sampled; set before the request is added
        self.jumped = False  # tokens were forced after the newest one
        self.ahead: list[int] = []  # forced before the first sample, and not given out yet
        self.cached_tokens = 0  # of the prompt, found in the cache at first admission

        # The scheduler's own.
        self.arrival = 0
        self.rank: tuple[int, bool, int] = (0, True, 0)  # in the queue: priority, never admitted, arrival
        self.born = time.monotonic()
        self.queue_seconds = 0.0  # until first admission
        self.limit = 0  # prompt and outputs together end here
        self.feed(self.prompt)
        self.stored = 0  # tokens whose KV is computed and applied
        self.pages: list[int] = []  # of full groups, block by block; the first `shared` are the tree's, under `node`
        self.shared = 0
        self.window: list[Block] = []  # of windowed groups, from block `gone` on
        self.gone = 0
        self.branch = 0  # tokens that the tree had, but not what the next one sees: others may part here, too
        self.node: Node | None = None  # None while waiting
        self.slot = -1  # row of the scheduler's table, -1 while it has none
        self.admitted = False  # at least once
        self.finished = False

    def feed(self, tokens: I32) -> None:
        """What prefill has to compute: the prompt, and after a retraction the outputs so far."""
        self.fed = tokens
        self.prefill = len(tokens)
        self.raw = tokens.tobytes()  # the same, for comparing in bulk
        self.hint = (-1, 0)  # version of the tree, and the prefix length it had then

    def tokens(self) -> I32:
        """Prompt and outputs, int32 [n]."""
        return np.concatenate((self.prompt, np.array(self.outputs, np.int32)))
