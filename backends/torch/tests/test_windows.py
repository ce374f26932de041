"""Models whose windowed layers give pages back, served by TorchOps: a hit and a miss give the same answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plain_backend import PlainBackend

from polyradix.cache.blocks import Groups
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.golden import load

Answer = tuple[list[int], list[float]]


def engine(family: str, groups: bool, **options: int | bool) -> EngineCore:
    backend, golden = PlainBackend(), load(family)
    if not groups:
        backend.caps = replace(backend.caps, features=backend.caps.features - {"kv_groups"})
    given: dict[str, int | bool] = {"kv_pages": 300, "max_seqs": 4, "max_tokens_per_step": 96, "max_context": 160}
    config = EngineConfig(model=family, dtype="float32", page_size=4, progress=False, **given | options)  # type: ignore[arg-type]
    return EngineCore(config, backend, golden.checkpoint())


def serve(core: EngineCore, prompts: list[list[int]]) -> list[Answer]:
    """Tokens and their logprobs, one prompt after the other."""
    out = []
    for prompt in prompts:
        params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=0)
        core.submit("a", np.array(prompt, np.int32), params)
        tokens, logprobs = list[int](), list[float]()
        while core.has_work:
            for chunk in core.step():
                assert chunk.finish != "error", chunk.error
                tokens += chunk.tokens
                logprobs += [each.logprob for each in chunk.logprobs or ()]
            core.scheduler.check()
        out.append((tokens, logprobs))
    return out


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_a_hit_gives_what_a_miss_gives(family: str) -> None:
    golden = load(family)
    long = golden.sequences[4][:70].tolist()  # the window is 20
    prompts = [long, long[:50] + [7] * 12, [*long, 3], long]
    want = serve(engine(family, groups=False, radix=False), prompts)
    assert want[0][0] == golden.sequences[4][70:79].tolist()
    prompts.append([*long, *want[0][0], 5, 6])
    want += serve(engine(family, groups=False, radix=False), prompts[-1:])
    core = engine(family, groups=True, kv_pages=140)
    assert core.groups == Groups(1, 2, 20)
    for (tokens, logprobs), (right, close) in zip(serve(core, prompts * 2), want * 2, strict=True):
        assert tokens == right
        assert logprobs == pytest.approx(close, abs=1e-4)
    assert core.stats().cached_tokens > 5 * 40
