"""Whole models with random weights, and whether one backend's greedy tokens are another's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyradix.backend.protocol import Backend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams

BASE = {
    "hidden_size": 256, "intermediate_size": 256, "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "moe_intermediate_size": 128, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}
MODELS = {  # in which every width is one that AITER has kernels for
    "llama": BASE | {"architectures": ["LlamaForCausalLM"]},
    "qwen3-moe": BASE | QWEN | {"architectures": ["Qwen3MoeForCausalLM"]},
    "deepseek-v3": BASE | LATENT | {"architectures": ["DeepseekV3ForCausalLM"], "norm_topk_prob": True},
    "deepseek-v2": BASE | LATENT | {
        "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    },
}  # fmt: skip
REAL = {  # the shapes of published models, with few layers
    "llama-8b": MODELS["llama"] | {
        "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": MODELS["qwen3-moe"] | {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    "deepseek-v3": MODELS["deepseek-v3"] | {
        "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "moe_intermediate_size": 2048, "n_routed_experts": 64, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    },
}  # fmt: skip
TOKENS = 24


@dataclass
class Answer:
    """Greedy tokens, and by how much each one's log-probability leads the next."""

    prompt: list[int]
    tokens: list[int]
    leads: list[float]


def core(backend: Backend, config: dict[str, Any], folder: Path) -> EngineCore:
    (folder / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {
        "load_format": "dummy",
        "progress": False,
        "max_seqs": 8,
        "max_context": 256,
        "kv_pages": 160,
    }
    return EngineCore(EngineConfig(model=str(folder), max_tokens_per_step=96, **options), backend)


def prompts(vocab: int, count: int = 5) -> list[list[int]]:
    """Some begin alike, and some are longer than a step."""
    r = np.random.default_rng(2)
    head = r.integers(0, vocab, 40).tolist()
    return [head[: 40 * (n % 2)] + r.integers(0, vocab, 7 + 29 * n).tolist() for n in range(count)]


def answers(engine: EngineCore, asked: list[tuple[list[int], int]]) -> list[Answer]:
    """To prompts, each with the number of tokens wanted; all at once."""
    out = {f"r{n}": Answer(prompt, [], []) for n, (prompt, _) in enumerate(asked)}
    for rid, (prompt, count) in zip(out, asked, strict=True):
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=2)
        engine.submit(rid, np.array(prompt, np.int32), params)
    while engine.has_work:
        for chunk in engine.step():
            assert not chunk.error, chunk.error
            out[chunk.rid].tokens += chunk.tokens
            out[chunk.rid].leads += [each.top[0][1] - each.top[1][1] for each in chunk.logprobs or ()]
    return list(out.values())


def compared(engine: EngineCore, reference: list[Answer]) -> Iterator[tuple[str, float, float | None]]:
    """Of every token: which it is, by how much it led in the reference, and here: None if another one did. After that
    the answer is taken up again, so that the tokens before are the reference's always."""
    at = [0] * len(reference)
    while todo := [i for i, a in enumerate(reference) if at[i] < len(a.tokens)]:
        asked = [(reference[i].prompt + reference[i].tokens[: at[i]], len(reference[i].tokens) - at[i]) for i in todo]
        for i, got in zip(todo, answers(engine, asked), strict=True):
            for token, lead in zip(got.tokens, got.leads, strict=True):
                n, same = at[i], token == reference[i].tokens[at[i]]
                yield f"answer {i}, token {n}", reference[i].leads[n], lead if same else None
                at[i] += 1
                if not same:
                    break


def follow(engine: EngineCore, reference: list[Answer], bound: float) -> float:
    """The share of tokens that are the reference's. Another one, where that led by more than `bound`, is an error."""
    same = []
    for where, want, got in compared(engine, reference):
        same.append(got is not None)
        assert got is not None or want <= bound, f"{where}: led by {want}"
    return sum(same) / len(same)


def apart(engine: EngineCore, reference: list[Answer]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By how much the lead of each token differs from the reference's; at least, if another token led."""
    return np.array([want if got is None else abs(want - got) for _, want, got in compared(engine, reference)])
