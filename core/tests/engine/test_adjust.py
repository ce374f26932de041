"""Penalties, biases, minimum lengths and log-probabilities of the prompt, against plain loops over the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import InvalidParam, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


class Recording(NumpyBackend):
    """Keeps the logits of every sample, by seed and position."""

    def __init__(self, overlapped: bool) -> None:
        super().__init__("float32", overlapped)
        self.logits: dict[tuple[int, int], np.ndarray] = {}

    def sample(self, logits: Any, batch: Any) -> Any:
        held = self.fetch(logits).result()
        for s, key in enumerate(zip(batch.seed.tolist(), batch.position.tolist(), strict=True)):
            self.logits[key] = held[s]
        return super().sample(logits, batch)


@pytest.fixture(params=[False, True], ids=["at once", "overlapped"])
def make(tmp_path: Path, request: Any) -> Any:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))

    def make(kind: Any = Recording, **options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 60, "max_seqs": 8, "page_size": 4, "max_tokens_per_step": 24}
        base |= {"load_format": "dummy", "progress": False, "model": str(path)}
        return EngineCore(EngineConfig(**(base | options)), kind(request.param))

    return make


PROMPTS = {seed: np.random.default_rng(seed).integers(1, 97, 5 + 3 * seed) for seed in range(6)}


def run(core: EngineCore, params: dict[int, SamplingParams]) -> dict[int, Any]:
    """Of each seed: tokens, finish and logprobs."""
    out: dict[int, Any] = {seed: ([], [], []) for seed in params}
    for seed, p in params.items():
        core.submit(str(seed), PROMPTS[seed], p)
    while core.has_work:
        for chunk in core.step():
            assert chunk.finish != "error", chunk.error
            tokens, finish, logprobs = out[int(chunk.rid)]
            tokens += chunk.tokens
            finish.append(chunk.finish)
            logprobs += chunk.logprobs or []
    return out


def penalised(logits: np.ndarray, prompt: list[int], said: list[int], p: SamplingParams, stops: set[int]) -> np.ndarray:
    """vLLM's definitions, token by token."""
    x = logits.astype(np.float64)
    for t in range(len(x)):
        if t in prompt or t in said:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * said.count(t) + p.presence_penalty * (t in said)
        x[t] += p.logit_bias.get(t, 0)
        if t in stops and len(said) < p.min_tokens:
            x[t] = -np.inf
    return x


FORMS: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"repetition_penalty": 3.0},
    {"logit_bias": {3: 100, 96: -100, 0: 2.5}},
    {"frequency_penalty": -2.0, "presence_penalty": 1.0, "repetition_penalty": 0.5, "logit_bias": {7: 5}},
    {},
]


def test_tokens_are_the_best_of_the_penalised(make: Any) -> None:
    core = make()
    params = {
        seed: SamplingParams(temperature=0, max_tokens=20, seed=seed, ignore_eos=True, **form)
        for seed, form in enumerate(FORMS)
    }
    out = run(core, params)
    changed = 0
    for seed, p in params.items():
        prompt, (tokens, _, _) = PROMPTS[seed].tolist(), out[seed]
        assert len(tokens) == 20
        for n, token in enumerate(tokens):
            logits = core.backend.logits[seed, len(prompt) + n]
            x = penalised(logits, prompt, tokens[:n], p, set())
            assert x[token] >= x.max() - 1e-4
            changed += token != int(logits.argmax())
    assert changed > 20


def test_penalties_survive_retraction(make: Any) -> None:
    params = {
        seed: SamplingParams(temperature=0, max_tokens=20, seed=seed, ignore_eos=True, **form)
        for seed, form in enumerate(FORMS)
    }
    small = make(kv_pages=20)
    want, got = run(make(), params), run(small, params)
    assert small.stats().retracted > 0
    assert {s: t for s, (t, _, _) in got.items()} == {s: t for s, (t, _, _) in want.items()}


def test_min_tokens(make: Any) -> None:
    free = run(make(), {1: SamplingParams(temperature=0, max_tokens=20, seed=1, ignore_eos=True)})[1][0]
    stop = free[2]
    for least in (0, 1, 9):
        p = SamplingParams(
            temperature=0, max_tokens=20, seed=1, ignore_eos=True, stop_token_ids=(stop,), min_tokens=least
        )
        core = make()
        tokens, finish, _ = run(core, {1: p})[1]
        assert stop not in tokens[:least]
        assert (finish[-1] == "stop") == (tokens[-1] == stop)
        for n, token in enumerate(tokens):
            x = penalised(core.backend.logits[1, len(PROMPTS[1]) + n], [], tokens[:n], p, {stop})
            assert x[token] == x.max()


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {97: 1}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_out_of_range(make: Any, form: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParam) as error:
        make().submit("a", PROMPTS[0], SamplingParams(**form))
    assert error.value.param == field


class Plain(Recording):
    """Claims neither masks nor adjustments."""

    def __init__(self, overlapped: bool) -> None:
        super().__init__(overlapped)
        self.caps = replace(self.caps, features=self.caps.features - {"mask", "adjust"})


def test_a_backend_that_cannot(make: Any) -> None:
    with pytest.raises(InvalidParam, match="nothing") as error:
        make(Plain).submit("a", PROMPTS[0], SamplingParams(presence_penalty=1.0))
    assert error.value.param == "presence_penalty"
