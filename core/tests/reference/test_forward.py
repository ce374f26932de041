"""Embeddings and prompt logprobs of a tiny model against transformers, in float32, while others are generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk, Read
from polyradix.schedule.params import InvalidParam, SamplingParams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 97
CASES: list[tuple[str, int, bool]] = [("numpy", 1, False), ("numpy", 1, True), ("numpy", 2, False), ("cpu", 1, False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(params=CASES, ids=str)
def core(request: pytest.FixtureRequest, model: tuple[Path, Any]) -> EngineCore:
    device, tp, overlapped = request.param
    options = {"async_launch": True} if overlapped else {}
    sizes = {"max_seqs": 6, "max_tokens_per_step": 16, "kv_pages": 20, "max_context": 128}
    config = EngineConfig(
        model=str(model[0]), device=device, tp=tp, embeddings=True, progress=False, backend_options=options, **sizes
    )
    return EngineCore(config)


def prompt(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, n).astype(np.int32)


def run(core: EngineCore) -> dict[str, Chunk]:
    out: dict[str, Chunk] = {}
    while core.has_work:
        out |= {c.rid: c for c in core.step() if c.finish}
        core.scheduler.check()
    return out


def read(core: EngineCore, rid: str, tokens: np.ndarray, want: Any, top: int = 0) -> None:
    core.read(Read(rid, tokens.astype("<i4").tobytes(), want, top))


def generate(core: EngineCore, count: int) -> None:
    for i in range(count):
        core.submit(f"g{i}", prompt(20, 40 + i), SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))


def test_embeddings(core: EngineCore, model: tuple[Path, Any]) -> None:
    prompts = {f"{want}-{n}": prompt(n, n) for want in ("last", "mean") for n in (1, 5, 33, 60)}
    generate(core, 3)
    for rid, tokens in prompts.items():
        read(core, rid, tokens, rid.partition("-")[0])
    out = run(core)
    for rid, tokens in prompts.items():
        with torch.no_grad():
            states = model[1].model(torch.tensor([tokens.tolist()])).last_hidden_state[0].numpy()
        want = states[-1] if rid.startswith("last") else states.mean(0)
        got = np.frombuffer(out[rid].embedding, "<f4")
        np.testing.assert_allclose(got, want / np.linalg.norm(want), atol=2e-5)


def test_prompt_logprobs(core: EngineCore, model: tuple[Path, Any]) -> None:
    prompts = {f"p{n}": prompt(n, n) for n in (1, 2, 17, 50)}
    generate(core, 3)
    for top, (rid, tokens) in enumerate(prompts.items()):
        read(core, rid, tokens, "logprobs", top)
    out = run(core)
    for top, (rid, tokens) in enumerate(prompts.items()):
        with torch.no_grad():
            want = model[1](torch.tensor([tokens.tolist()])).logits[0].log_softmax(-1).numpy()
        got = out[rid].logprobs
        assert got is not None
        chosen = [want[i, tokens[i + 1]] for i in range(len(tokens) - 1)]
        np.testing.assert_allclose([entry.logprob for entry in got], chosen, atol=1e-4)
        for i, entry in enumerate(got):
            assert [t for t, _ in entry.top] == np.argsort(-want[i])[:top].tolist()
            np.testing.assert_allclose([v for _, v in entry.top], np.sort(want[i])[::-1][:top], atol=1e-4)


def test_generation_beside_is_the_same(core: EngineCore) -> None:
    generate(core, 2)
    alone = {rid: chunk.tokens for rid, chunk in run(core).items()}
    generate(core, 2)
    for i in range(4):
        read(core, f"r{i}", prompt(90, i), ("mean", "logprobs")[i % 2])
    core.step()
    assert core.abort("r0")
    assert not core.abort("r0")
    out = run(core)
    assert {rid: out[rid].tokens for rid in alone} == alone
    assert "r0" not in out
    assert core.scheduler.pages_used == 0


def test_what_can_never_be_served(core: EngineCore) -> None:
    bad = (np.array([], np.int32), np.array([VOCAB]), np.array([-1]), prompt(129, 1))
    for tokens in bad:
        with pytest.raises(InvalidParam, match="prompt"):
            read(core, "bad", tokens, "last")
    assert not core.has_work
