"""An engine over whatever backend: for comparing one rank with several."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.golden import load


def served(backend: Any, requests: int, tokens: int) -> list[list[int]]:
    """Greedy tokens of requests that share prefixes, more than run at once, in a cache too small for all."""
    golden, page = load("llama"), backend.caps.page_sizes[0]
    config = EngineConfig(
        model=golden.name,
        dtype="float32",
        max_context=128,
        page_size=page,
        kv_pages=requests * 64 // page,
        max_seqs=requests * 3 // 4,
        max_tokens_per_step=128,
        progress=False,
    )
    core = EngineCore(config, backend, golden.checkpoint())
    rng, out = np.random.default_rng(1), [[] for _ in range(requests)]  # type: ignore[var-annotated]
    head = rng.integers(1, golden.spec.vocab, 60)
    for i in range(requests):
        own = rng.integers(1, golden.spec.vocab, int(rng.integers(1, 30)))
        prompt = np.concatenate([head[: int(rng.integers(0, 60))], own]).astype(np.int32)
        core.submit(str(i), prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            assert not chunk.error, chunk.error
            out[int(chunk.rid)] += chunk.tokens
    assert {len(each) for each in out} == {tokens}
    return out
