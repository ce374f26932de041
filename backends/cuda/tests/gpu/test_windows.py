"""Models whose windowed layers give pages back: hits give what a cache that shares and gives back nothing gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from polyradix.backend.registry import open_backend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.golden import load

DEVICE, TOKENS, BOUND = "cuda", 40, 1e-3


def engine(family: str, capture: int, groups: bool, **options: Any) -> EngineCore:
    backend = open_backend(DEVICE, capture=capture)
    if not groups:
        backend.caps = replace(backend.caps, features=backend.caps.features - {"kv_groups"})
    sizes = {"max_seqs": 4, "max_tokens_per_step": 64, "max_context": 256}
    config = EngineConfig(model=family, dtype="float32", progress=False, **sizes, **options)
    return EngineCore(config, backend, load(family).checkpoint())


def serve(core: EngineCore, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their logprobs, of prompts that are served together."""
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0)
        core.submit(str(i), np.array(prompt, np.int32), params)
    while core.has_work:
        for chunk in core.step():
            assert chunk.finish != "error", chunk.error
            out[int(chunk.rid)][0].extend(chunk.tokens)
            out[int(chunk.rid)][1].extend(each.logprob for each in chunk.logprobs or ())
        core.scheduler.check()
    return out


@pytest.mark.parametrize("capture", [1, 0])
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_a_hit_gives_what_a_miss_gives(family: str, capture: int) -> None:
    long = load(family).sequences[4][:70].tolist()  # the window is 20
    prompts = [long, long[:50] + [7] * 12, [*long, 3], long[::-1]]
    want = serve(engine(family, capture, groups=False, radix=False, kv_pages=100), prompts)
    core = engine(family, capture, groups=True, kv_pages=100)
    assert core.groups.windowed == 2
    for got in (serve(core, prompts), serve(core, prompts)):
        for (tokens, logprobs), (right, close) in zip(got, want, strict=True):
            assert tokens == right
            assert logprobs == pytest.approx(close, abs=BOUND)
    assert core.stats().cached_tokens >= 200
