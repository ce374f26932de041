"""Models with windowed and full layers: their windowed layers give pages back, and no bit of an answer changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.cache.blocks import Groups
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Read
from polyradix.schedule.params import SamplingParams

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES |= {"vocab_size": 61, "max_position_embeddings": 128, "torch_dtype": "float32", "sliding_window": 9}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 4, "sliding_window_pattern": 4},
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
GROUPS = {"gemma3": Groups(1, 3, 9), "gpt-oss": Groups(1, 1, 9)}
RNG = np.random.default_rng(1)
HEAD = RNG.integers(1, 61, 30).tolist()
PROMPTS = [HEAD, [*HEAD[:23], 5, 6], HEAD[:23] + [7] * 20, [*HEAD, 8, 9], HEAD, HEAD[:6] + [3] * 16]
OVERLAPPED = {"overlapped": True}

Answer = tuple[list[int], list[float]]


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(family: str, tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | MODELS[family]))

    def make(overlapped: bool = False, groups: bool = True, **options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 200, "max_seqs": 4, "page_size": 4, "max_tokens_per_step": 40}
        base |= {"device": "numpy", "load_format": "dummy", "progress": False, "model": str(tmp_path)}
        backend = NumpyBackend("float32", overlapped)
        if not groups:
            backend.caps = replace(backend.caps, features=backend.caps.features - {"kv_groups"})
        return EngineCore(EngineConfig(**(base | options)), backend)

    return make


def _run(core: EngineCore, prompts: list[list[int]]) -> list[Answer]:
    """Tokens and their logprobs, of prompts that are served together."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True, logprobs=0)
        core.submit(f"{i}", np.array(prompt, np.int32), params)
    out: list[Answer] = [([], []) for _ in prompts]
    while core.has_work:
        for chunk in core.step():
            assert chunk.finish != "error", chunk.error
            tokens, logprobs = out[int(chunk.rid)]
            tokens += chunk.tokens
            logprobs += [each.logprob for each in chunk.logprobs or ()]
        core.scheduler.check()
    return out


@pytest.fixture
def plain(make: Any) -> Any:
    """Answers of a cache that shares and gives back nothing, for one prompt at a time."""
    core = make(groups=False, radix=False)
    assert core.groups == Groups()
    return lambda prompts: [_run(core, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("options", [{}, OVERLAPPED | {"chunked_prefill_size": 7}, OVERLAPPED | {"kv_pages": 46}])
def test_a_hit_is_bit_exact_with_a_miss(family: str, make: Any, plain: Any, options: dict[str, Any]) -> None:
    want = plain(PROMPTS)
    core = make(**options)
    assert core.groups == GROUPS[family]
    assert _run(core, PROMPTS) == want
    cached = core.stats().cached_tokens
    assert _run(core, PROMPTS[::-1]) == want[::-1]
    assert core.stats().cached_tokens > cached
    turns = [[*prompt, *tokens, 4, 2] for prompt, (tokens, _) in zip(PROMPTS, want, strict=True)]
    cached = core.stats().cached_tokens
    assert _run(core, turns) == plain(turns)
    assert core.stats().cached_tokens > cached
    assert core.stats().pages_used == 0
    assert (core.stats().retracted > 0) == ("kv_pages" in options)


def test_a_prefix_longer_than_a_window_is_hit_once_two_requests_parted_there(make: Any) -> None:
    core = make(chunked_prefill_size=4)  # so that the first has given back what the second would need
    tails = [[t] * 30 for t in (1, 2, 3)]
    cached = []
    for tail in tails:
        before = core.stats().cached_tokens
        _run(core, [HEAD[:24] + tail])
        cached.append(core.stats().cached_tokens - before)
    assert cached == [0, 0, 24]


def test_pages_for_no_block_are_refused(make: Any, family: str) -> None:
    count = GROUPS[family].count
    with pytest.raises(ConfigError, match=f"kv_pages is {count}; expected more than {count}, the groups of layers"):
        make(kv_pages=count)
    assert make(kv_pages=count + 1).info()["kv_groups"] == count


def test_forward_passes_have_pages_of_all_groups(make: Any) -> None:
    results = []
    for groups in (True, False):
        core = make(groups=groups, embeddings=True)
        core.read(Read("a", np.array(HEAD, "<i4").tobytes(), "mean"))
        core.read(Read("b", np.array(HEAD[::-1], "<i4").tobytes(), "logprobs", 2))
        chunks = []
        while core.has_work:
            chunks += core.step()
        results.append([(chunk.embedding, chunk.logprobs) for chunk in sorted(chunks, key=lambda c: c.rid)])
    assert results[0] == results[1]
