"""The engine with a real model on this backend: against transformers in float32, and itself in other batches."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk
from polyradix.engine.offline import Engine
from polyradix.schedule.params import SamplingParams

SOAK_SECONDS = float(os.environ.get("POLYRADIX_SOAK_SECONDS", "6"))
TOPICS = ["rivers", "music", "the moon", "bread", "chess", "winter", "trains", "glass", "honey", "maps"]
FORMS = (
    "Write one sentence about {}.",
    "A short history of {}:",
    "The three most important facts about {} are",
    "def count_{}(items):",
    "Q: Why do people care about {}?\nA:",
)
Job = tuple[list[int], SamplingParams]
Answer = tuple[list[int], list[float]]  # tokens and their logprobs
PROMPTS = [form.format(topic) for topic in TOPICS for form in FORMS]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        "demo",
        device="cpu",
        dtype="bfloat16",
        max_context=512,
        kv_pages=600,
        max_tokens_per_step=256,
        embeddings=True,
    )


@pytest.fixture(scope="module")
def blur(demo_reference: Any) -> float:
    """What bfloat16 does to a logit: twice the largest error of the reference's own bfloat16 copy."""
    rough = copy.deepcopy(demo_reference).to(torch.bfloat16)
    ids = list(range(1000, 1064))
    (ours,), (exact,) = (_logits(model, [ids[:8]], [ids[8:]]) for model in (rough, demo_reference))
    return float(2 * np.abs(ours - exact).max())


@torch.inference_mode()
def _logits(model: Any, prompts: list[list[int]], outputs: list[list[int]]) -> Iterator[np.ndarray]:
    """float32 logits [len(output), V] that predict each token of an output. Ten at a time, filled up behind: what is
    there changes nothing before it."""
    for at in range(0, len(prompts), 10):
        pairs = list(zip(prompts[at : at + 10], outputs[at : at + 10], strict=True))
        rows = [torch.tensor(prompt + output) for prompt, output in pairs]
        logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
        for row, (prompt, output) in zip(logits, pairs, strict=True):
            yield row[len(prompt) - 1 : len(prompt) + len(output) - 1].float().numpy()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_references_hidden_states(engine: Engine, demo_reference: Any, pooling: Any) -> None:
    for prompt, vector in zip(PROMPTS[:3], engine.embed(PROMPTS[:3], pooling), strict=True):
        with torch.inference_mode():
            states = demo_reference.model(torch.tensor([engine.tokenizer.encode(prompt)])).last_hidden_state[0]
        exact = (states[-1] if pooling == "last" else states.mean(0)).numpy()
        assert vector @ exact / np.linalg.norm(exact) > 0.99


def _run(
    core: EngineCore, jobs: dict[str, tuple[list[int], SamplingParams]]
) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and their logprobs by request, all submitted together."""
    out: dict[str, tuple[list[int], list[float]]] = {rid: ([], []) for rid in jobs}
    for rid, (tokens, params) in jobs.items():
        core.submit(rid, np.array(tokens, np.int32), params)
    while core.has_work:
        for chunk in core.step():
            _keep(out[chunk.rid], chunk)
    return out


def _keep(held: Answer, chunk: Chunk) -> None:
    assert chunk.finish != "error", chunk.error
    held[0].extend(chunk.tokens)
    held[1].extend(t.logprob for t in chunk.logprobs or [])


def _greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, logprobs=0)


def test_bfloat16_follows_transformers_float32(engine: Engine, demo_reference: Any, blur: float) -> None:
    """Where the two best logits are further apart than bfloat16 can blur, the token is the reference's."""
    prompts = [engine.tokenizer.encode(p) for p in PROMPTS]
    results = engine.generate(prompts, max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)
    decided = 0
    for exact, result in zip(_logits(demo_reference, prompts, [r.tokens for r in results]), results, strict=True):
        second, best = np.sort(exact, axis=1)[:, -2:].T
        clear = best - second > blur
        assert (exact.argmax(1) == result.tokens)[clear].all()
        decided += int(clear.sum())
        own = np.array([t.logprob for t in result.logprobs])
        logprobs = torch.log_softmax(torch.from_numpy(exact).double(), 1).numpy()
        assert np.abs(own - logprobs[np.arange(16), result.tokens]).max() <= blur
    assert decided > 250, "too few positions were clear enough to compare"


def test_float32_equals_transformers(demo_reference: Any) -> None:
    engine = Engine("demo", device="cpu", dtype="float32", max_context=256, kv_pages=600)
    prompts = [engine.tokenizer.encode(p) for p in PROMPTS]
    outputs = [r.tokens for r in engine.generate(prompts, max_tokens=16, temperature=0, ignore_eos=True)]
    for exact, output in zip(_logits(demo_reference, prompts, outputs), outputs, strict=True):
        assert exact.argmax(1).tolist() == output


def test_hit_chunked_and_alone_have_the_bits_of_a_miss(engine: Engine) -> None:
    """One prompt of 200 tokens: whole and alone, in a batch of others, in chunks, and after its prefix was cached."""
    text = " ".join(PROMPTS)
    prompt = engine.tokenizer.encode(text)[:200]
    others = {f"o{i}": (engine.tokenizer.encode(p), _greedy(24)) for i, p in enumerate(PROMPTS[:9])}
    engine.core.flush_cache()
    miss = _run(engine.core, {"miss": (prompt, _greedy(24))})["miss"]
    cached = engine.core.stats().cached_tokens
    hit = _run(engine.core, {"hit": (prompt, _greedy(24))})["hit"]
    assert engine.core.stats().cached_tokens - cached >= 176
    engine.core.flush_cache()
    batched = _run(engine.core, others | {"batched": (prompt, _greedy(24))})["batched"]
    small = EngineConfig(
        model="demo", device="cpu", dtype="bfloat16", max_context=512, kv_pages=100, max_tokens_per_step=17,
        max_seqs=10, progress=False,
    )  # fmt: skip
    chunked = _run(EngineCore(small), {"chunked": (prompt, _greedy(24))})["chunked"]
    assert hit == miss
    assert batched == miss
    assert chunked == miss


def test_second_turn_reuses_the_first(engine: Engine) -> None:
    engine.core.flush_cache()
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Name three rivers, and say one thing about each."}]
    first = engine.chat(talk, max_tokens=48, temperature=0)
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And three lakes?"}]
    second = engine.chat(talk, max_tokens=4, temperature=0)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= (first.prompt_tokens + len(first.tokens)) // 16 * 16 - 16


def test_random_traffic_with_cancels_keeps_every_page(engine: Engine) -> None:
    """Mixed lengths, shared prefixes, random cancels; afterwards a sample of the answers is computed again alone."""
    rng = random.Random(5)
    core = engine.core
    heads = [engine.tokenizer.encode(" ".join(rng.sample(PROMPTS, 12)))[:160] for _ in range(4)]
    jobs: dict[str, Job] = {}
    got: dict[str, Answer] = {}
    finished: set[str] = set()
    deadline = time.monotonic() + SOAK_SECONDS
    for rid in _until(deadline):
        if core.stats().waiting < 20 and rng.random() < 0.5:
            tokens = rng.choice(heads)[: rng.randrange(1, 160)] + [
                rng.randrange(300, 40000) for _ in range(rng.randrange(1, 90))
            ]
            params = SamplingParams(
                max_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(10**6),
                top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 40]), logprobs=0, ignore_eos=True,
            )  # fmt: skip
            jobs[rid], got[rid] = (tokens, params), ([], [])
            core.submit(rid, np.array(tokens, np.int32), params)
        if rng.random() < 0.08 and len(jobs) > 1:
            victim = rng.choice(list(jobs))
            if victim not in finished:
                core.abort(victim)
                del jobs[victim], got[victim]
        for chunk in core.step():
            if chunk.rid in got:
                _keep(got[chunk.rid], chunk)
                finished |= {chunk.rid} if chunk.finish else set()
        core.scheduler.check()
    while core.has_work:
        for chunk in core.step():
            if chunk.rid in got:
                _keep(got[chunk.rid], chunk)
                finished |= {chunk.rid} if chunk.finish else set()
    core.scheduler.check()
    stats = core.stats()
    assert finished == set(jobs), "a request was lost"
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert len(finished) > 5
    for rid in rng.sample(sorted(finished), min(12, len(finished))):
        core.flush_cache()
        assert _run(core, {"again": jobs[rid]})["again"] == got[rid]


def _until(deadline: float) -> Iterator[str]:
    """At least so many that a slow machine has something to judge."""
    n = 0
    while time.monotonic() < deadline or n < 30:
        n += 1
        yield f"r{n}"
