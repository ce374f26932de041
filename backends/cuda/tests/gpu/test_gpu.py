"""On a GPU: `pytest backends/cuda/tests/gpu`. Every case captured and eager, and what no single case asks.

POLYRADIX_SOAK_SECONDS is how long the random traffic lasts, 60 by default.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest

from polyradix.backend.registry import open_backend
from polyradix.schedule.params import SamplingParams
from polyradix_conformance.cases.graph import Model, decodes, prefill
from polyradix_conformance.cases.serving import Job, Server, greedy
from polyradix_conformance.golden import load
from polyradix_conformance.rig import Rig

SOAK_SECONDS = float(os.environ.get("POLYRADIX_SOAK_SECONDS", "60"))
MODES = {"captured": 1, "eager": 0}


def opened(mode: str) -> Any:
    return open_backend("cuda", capture=MODES[mode])


@pytest.mark.conformance(backend="cuda")
def test_captured(conformance_case: Any) -> None:
    conformance_case.check()


@pytest.mark.conformance(backend="cuda", profile="quant")
def test_quantised(conformance_case: Any) -> None:
    conformance_case.check()


@pytest.mark.conformance(backend="cuda", options={"capture": 0})
def test_eager(conformance_case: Any) -> None:
    conformance_case.check()


def tokens(mode: str, jobs: dict[str, Job]) -> dict[str, list[int]]:
    server = Server(Rig(opened(mode), "float32"))
    return {rid: answer.tokens for rid, answer in server.serve(jobs).items()}


def test_captured_and_eager_give_the_same_tokens() -> None:
    """Greedy, float32: in float32 no two logits of this model are so close that the order of sums decides."""
    r = np.random.default_rng(1)
    vocab = load("smollm").spec.vocab
    jobs = {f"r{n}": greedy(r.integers(0, vocab, int(r.integers(1, 120))), n=40) for n in range(24)}
    assert tokens("captured", jobs) == tokens("eager", jobs)


def test_captured_decodes_follow_their_parameters_and_cache() -> None:
    """Weights 0, 1 and 0 again, each in a new cache: as eager steps have it."""
    golden, logits = load("llama"), {}
    for mode in MODES:
        model = Model(Rig(opened(mode), "float32"), golden)
        first, second = model.params, model.packed(seed=1)
        logits[mode] = []
        for params in (first, second, first):
            model.params, model.kv = params, model.cache()
            logits[mode].append([model.step(parts)[0] for parts in (prefill(golden), *decodes(golden)[:3])])
    for captured, eager in zip(logits["captured"], logits["eager"], strict=True):
        for x, y in zip(captured, eager, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    same, other, again = (run[-1] for run in logits["captured"])
    np.testing.assert_allclose(same, again, rtol=1e-3, atol=1e-4)
    assert np.abs(same - other).max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_random_traffic_keeps_every_page(mode: str) -> None:
    """Mixed lengths, shared prefixes, cancels, a cache too small for all. Greedy answers are those they get alone."""
    r = random.Random(7)
    vocab = load("smollm").spec.vocab
    heads = [[r.randrange(vocab) for _ in range(160)] for _ in range(4)]
    server = Server(Rig(opened(mode), "float32"), kv_pages=150, max_seqs=24)
    jobs: dict[str, Job] = {}
    deadline, most = time.monotonic() + SOAK_SECONDS, 0
    while time.monotonic() < deadline:
        if server.core.stats().waiting < 20 and r.random() < 0.5:
            rid = f"r{len(jobs)}"
            jobs[rid] = random_job(r, heads, vocab)
            server.submit(rid, jobs[rid])
        if jobs and r.random() < 0.05:
            server.core.abort(r.choice(list(jobs)))
        server.step()
        most = max(most, server.core.stats().running)
    answers = server.finish()
    server.core.scheduler.check()
    stats = server.core.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert most > 8, "the traffic was too thin"
    whole = [rid for rid, job in jobs.items() if len(answers[rid].tokens) == job.params.max_tokens]
    fixed = [rid for rid in whole if jobs[rid].params.temperature == 0]
    assert len(fixed) > 5
    for rid in r.sample(fixed, min(12, len(fixed))):
        server.core.flush_cache()
        assert server.serve({rid: jobs[rid]})[rid].tokens == answers[rid].tokens


def random_job(r: random.Random, heads: list[list[int]], vocab: int) -> Job:
    prompt = r.choice(heads)[: r.randrange(1, 160)] + [r.randrange(vocab) for _ in range(r.randrange(1, 90))]
    params = SamplingParams(
        max_tokens=r.randrange(1, 40), temperature=r.choice([0.0, 0.8]), seed=r.randrange(10**6),
        top_p=r.choice([1.0, 0.9]), top_k=r.choice([0, 40]), ignore_eos=True,
    )  # fmt: skip
    return Job(np.array(prompt), params)
